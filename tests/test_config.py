"""Settings: how they are read, what is refused, what may differ when a run is resumed."""

import dataclasses
import json
from functools import partial

import jax
import pytest
from ml_collections import ConfigDict
from running import CONFIG, load_config

from lm import config as configs
from lm import presets, settings
from lm.errors import UsageError
from lm.model import parameters
from lm.runs import execution


def write(path, text):
    path.write_text(text)
    return str(path)


# ---- values ----


@pytest.mark.parametrize(
    ('text', 'key', 'value'),
    [
        ('steps=1e3', 'steps', 1000),
        ('steps=250', 'steps', 250),
        ('steps=none', 'steps', None),
        ('steps=None', 'steps', None),
        ('microbatch=4', 'execution.microbatch', 4),
        ('optim.lr=1e-3', 'optim.lr', 0.001),
        ('optim.lr=1', 'optim.lr', 1.0),
        ('model.window=128', 'model.window', 128),
        ('model.window=none', 'model.window', None),
        ('model.attn_softcap=50', 'model.attn_softcap', 50.0),
        ('model.tied=false', 'model.tied', False),
        ('model.tied=True', 'model.tied', True),
        ('execution.scan=1', 'execution.scan', True),
        ('model.scan=0', 'execution.scan', False),
        ('data.mixture=botocore:0.7,chitchat:0.3', 'data.mixture', 'botocore:0.7,chitchat:0.3'),
        ('data.mixture=a=b.jsonl', 'data.mixture', 'a=b.jsonl'),
        ('init_from=runs/a@10', 'init_from', 'runs/a@10'),
        ('init_from=none', 'init_from', None),
        ('mesh.fsdp=-1', 'mesh.fsdp', -1),
        ('precision.compute=bfloat16', 'execution.dtype', 'bfloat16'),
        ('optim.clip=none', 'optim.clip', None),
        ('optim.clip=2', 'optim.clip', 2.0),
    ],
)
def test_a_value_is_read_as_the_declared_type(text, key, value):
    read = dict(configs.leaves(load_config(f'--config.{text}')))[key]
    assert read == value and type(read) is type(value)


def test_a_large_whole_number_is_exact():
    config = ConfigDict({'n': 1})
    configs.override(config, 'n', '9007199254740993')
    assert config.n == 9007199254740993


def test_a_value_may_stand_in_a_word_of_its_own():
    assert load_config('--config.optim.lr', '2e-3').optim.lr == 2e-3


def test_the_last_of_two_settings_counts():
    assert load_config('--config.seed=1', '--config.seed=2').seed == 2


@pytest.mark.parametrize(
    ('text', 'wanted'),
    [
        ('steps=many', 'steps=many: must be a whole number or none'),
        ('steps=1.5', 'must be a whole number'),
        ('steps=1e-3', 'must be a whole number'),
        ('steps=inf', 'must be a whole number'),
        ('steps=nan', 'must be a whole number'),
        ('steps=', 'must be a whole number'),
        ('batch_size=none', 'batch_size=none: must be a whole number$'),
        ('model.tied=maybe', 'must be true or false'),
        ('model.tied=none', 'must be true or false$'),
        ('optim.lr=fast', 'must be a number$'),
        ('model.window=wide', 'must be a whole number or none'),
    ],
)
def test_a_wrong_type_is_refused(text, wanted):
    with pytest.raises(UsageError, match=wanted):
        load_config(f'--config.{text}')


@pytest.mark.parametrize(
    ('key', 'nearest'),
    [
        ('optim.learning_rate', 'optim'),
        ('lr', 'optim.lr'),
        ('data', 'data.mixture'),
        ('batch', 'batch_size'),
        ('batchsize', 'batch_size'),
        ('model.head', 'model.heads'),
        ('optm.lr', 'optim.lr'),
        ('eval.evry', 'eval.every'),
        ('chekpoint.keep', 'checkpoint.keep'),
    ],
)
def test_an_unknown_key_names_the_nearest(key, nearest):
    with pytest.raises(UsageError, match=rf'unknown setting {key} \(did you mean {nearest}'):
        load_config(f'--config.{key}=1')


@pytest.mark.parametrize('key', ['model', 'xyzzyqqq', 'model.dim.x', '', 'seed.'])
def test_what_is_no_setting_is_refused(key):
    with pytest.raises(UsageError, match='unknown setting'):
        load_config(f'--config.{key}=1')


def test_a_setting_without_a_value_is_refused():
    with pytest.raises(UsageError, match='--config.steps has no value'):
        load_config('--config.steps')


@pytest.mark.parametrize(
    'text',
    [
        'steps=0', 'steps=-1', 'batch_size=0', 'seq_len=0', 'execution.microbatch=0', 'checkpoint.every=0',
        'checkpoint.keep=0',
        'eval.every=0', 'eval.rows=0', 'eval.max_new_tokens=0', 'log.every=0', 'log.profile=-1',
        'model.window=0', 'model.vocab_size=0', 'model.dim=0', 'model.layers=0', 'model.kv_heads=0', 'model.heads=0',
        'model.head_dim=0', 'model.ffn_dim=0', 'model.norm_eps=0', 'model.rope_theta=-1', 'model.attn_softcap=0',
        'optim.lr=0', 'optim.lr=nan', 'optim.lr=inf', 'optim.clip=0', 'optim.eps=0', 'optim.b1=1', 'optim.b2=-0.1',
        'optim.warmup=-1', 'optim.decay=2', 'optim.final=-1', 'optim.weight_decay=-1', 'optim.weight_decay=nan',
        'steps=3e9', 'batch_size=2147483648', 'model.vocab_size=1e12', 'eval.rows=1e10', 'eval.max_new_tokens=1e7',
        'optim.warmup=1e10', 'log.profile=1e10', 'model.rope_theta=0.5', 'model.rope_theta=inf', 'z_loss=inf',
        'optim.lr=1e39', 'optim.clip=inf', 'optim.eps=nan', 'model.attn_softcap=inf',
        'optim.max_skips=-1', 'z_loss=-1', 'data.heldout=0', 'data.heldout=1',
        'seed=-1', 'seed=4294967296',
    ],
)  # fmt: skip
def test_a_value_that_no_run_can_have_is_refused(text):
    with pytest.raises(UsageError, match=f'^{text.partition("=")[0]}=.* must be '):
        load_config(f'--config.{text}')


@pytest.mark.parametrize(
    'text',
    [
        'optim.schedule=cosin',
        'optim.name=adam',
        'execution.dtype=float16',
        'execution.attention=flash',
        'execution.remat=some',
        'model.norms=before',
        'model.activation=relu',
    ],
)
def test_a_choice_names_what_there_is(text):
    with pytest.raises(UsageError, match=f'^{text}.* is not one of'):
        load_config(f'--config.{text}')


def test_the_tokens_of_a_step_are_counted_in_int32():
    assert load_config('--config.batch_size=32768', '--config.seq_len=65535').batch_size == 32768
    with pytest.raises(UsageError, match=r'batch_size=32768 × seq_len=65536 must be at most 2147483647'):
        load_config('--config.batch_size=32768', '--config.seq_len=65536')


def test_microbatch_divides_the_batch():
    assert load_config('--config.batch_size=6', '--config.execution.microbatch=3').execution.microbatch == 3
    with pytest.raises(UsageError, match='batch_size=6 is not a multiple of execution.microbatch=4'):
        load_config('--config.batch_size=6', '--config.execution.microbatch=4')


def test_a_run_starts_from_one_other():
    with pytest.raises(UsageError, match='set one of them'):
        load_config('--config.init_from=a', '--config.branch_from=b')


# ---- files ----


@pytest.mark.parametrize(
    ('text', 'wanted'),
    [
        ('x = 1\n', 'has no function get_config'),
        ('x = 1\ndef get_config(arg:\n', r':2: SyntaxError'),
        ('import nosuchmodule\n', r':1: ModuleNotFoundError: .*nosuchmodule'),
        ('def get_config(arg):\n    c = 1\n    return c.x\n', r':3: AttributeError'),
        (
            'from lm import config\ndef get_config(arg):\n    c = config.base()\n    c.optim.lrr = 1.0\n    return c\n',
            ':4: .*lr',
        ),
        (
            'from lm import config\ndef get_config(arg):\n    c = config.base()\n    c.seed = "x"\n    return c\n',
            ':4: TypeError',
        ),
    ],
)
def test_a_faulty_config_file_is_named_with_its_line(tmp_path, text, wanted):
    path = write(tmp_path / 'mine.py', text)
    with pytest.raises(UsageError, match=wanted) as raised:
        configs.load(path)
    assert path in str(raised.value)


def test_a_config_file_that_is_not_there(tmp_path):
    for path in (tmp_path / 'no.py', tmp_path):
        with pytest.raises(UsageError, match='no such file'):
            configs.load(str(path))
    with pytest.raises(UsageError, match=r'configs/pretrian.py: no such file'):
        configs.load('configs/pretrian.py:124m')
    with pytest.raises(UsageError, match='not a Python file'):
        configs.load(write(tmp_path / 'a.txt', ''))


def test_every_setting_of_every_stage_is_declared_once_with_a_meaning():
    for kind in configs._kinds():
        for field in dataclasses.fields(kind):
            assert dataclasses.is_dataclass(field.default) or len(field.metadata['meaning']) > 3
        assert len(configs.fields_of(kind)) < (121 if issubclass(kind, settings.Online) else 91)
    assert 'beta' in configs.fields_of(settings.Dpo) and 'beta' not in configs.fields_of(settings.Sft)
    assert dict(configs.leaves(configs.base(settings.Sft))).keys() == configs.fields_of(settings.Sft).keys()


def test_a_stage_may_add_settings(tmp_path):
    text = 'from lm import config\ndef get_config(arg):\n    c = config.base()\n'
    text += '    with c.unlocked():\n        c.mine = 3\n    return c\n'
    assert configs.load(write(tmp_path / 'mine.py', text), [('mine', '4')])[0].mine == 4


def test_a_file_that_says_a_setting_by_its_name_of_before(tmp_path):
    text = 'from lm import config\ndef get_config(arg):\n    c = config.base()\n'
    with pytest.raises(UsageError) as refused:
        configs.load(write(tmp_path / 'mine.py', f'{text}    c.microbatch = 4\n    return c\n'))
    said = str(refused.value)
    assert said.endswith('(microbatch is execution.microbatch now)') and '\n' not in said and 'mine.py:4' in said
    opened = f'{text}    with c.unlocked():\n        c.microbatch = 4\n    return c\n'
    found = configs.load(write(tmp_path / 'other.py', opened), [('execution.microbatch', '2')])[0]
    assert found.execution.microbatch == 2 and 'microbatch' not in found  # nothing of before is left to win later


# ---- what stands after the colon ----


@pytest.mark.parametrize(
    ('arg', 'millions'), [('124m', 124), ('350m', 355), ('1b', 1236), ('8b', 8030), ('70b', 70_554)]
)
def test_a_preset_has_the_parameters_that_its_name_says(arg, millions):
    cfg = execution.model_config(load_config(arg=arg))
    shapes = jax.eval_shape(partial(parameters.init, cfg=cfg), jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(shapes)) / 1e6 == pytest.approx(millions, rel=0.03)


def test_depth_4_is_what_the_file_says():
    assert dict(configs.leaves(load_config(arg='depth=4'))) == dict(configs.leaves(load_config()))


@pytest.mark.parametrize('n', [1, 2, 6, 12, 24])
def test_depth_moves_width_rate_batch_horizon_and_decay(n):
    laptop, other = load_config(), load_config(arg=f'depth={n}')
    assert (other.model.layers, other.model.dim, other.model.heads, other.model.head_dim) == (n, 32 * n, n, 32)
    assert other.optim.lr == pytest.approx(laptop.optim.lr / (n / 4) ** 0.5, rel=5e-3)
    count = lambda c: jax.eval_shape(partial(parameters.init, cfg=execution.model_config(c)), jax.random.key(0))
    size, tokens = (lambda c: sum(x.size for x in jax.tree.leaves(count(c)))), (lambda c: c.steps * c.batch_size)
    assert tokens(other) / tokens(laptop) == pytest.approx(size(other) / size(laptop), rel=0.02)
    assert other.batch_size % 8 == 0 and other.batch_size >= laptop.batch_size
    growth = max(1.0, (tokens(other) / tokens(laptop)) ** 0.5)
    assert other.batch_size / laptop.batch_size == pytest.approx(growth, rel=0.3)
    reach = lambda c: c.optim.lr * c.optim.weight_decay * c.steps
    assert reach(other) == pytest.approx(reach(laptop), rel=0.02)
    assert other.optim.warmup / other.steps == pytest.approx(laptop.optim.warmup / laptop.steps, rel=0.06)


def test_a_small_rate_keeps_its_digits():
    config = configs.base()
    config.optim.lr = 4e-5
    assert presets.apply(config, 'depth=100').optim.lr == 8e-6
    config.optim.lr = 1e-7
    assert presets.apply(config, 'depth=64').optim.lr == 2.5e-8


def test_parts_of_an_argument_apply_in_order():
    config = load_config(arg='depth=12,steps=500')
    assert (config.model.layers, config.steps) == (12, 500)
    assert load_config(arg='124m,model.window=64').model.window == 64
    assert load_config('--config.steps=7', arg='depth=12,steps=500').steps == 7


def test_depth_leaves_an_epoch_an_epoch():
    config = configs.base()
    assert presets.apply(config, 'depth=2').steps is None


@pytest.mark.parametrize(
    ('arg', 'wanted'),
    [
        ('124n', r'unknown preset :124n \(did you mean 124m\?\)'),
        ('giant', 'unknown preset :giant'),
        ('smollm2', r':smollm2 has been pretrained: make a run of it with python -m lm.convert smollm2 runs/smollm2'),
        ('depth=0', 'depth=0: must be a whole number of layers'),
        ('depth=x', 'depth=x'),
        ('dpth=3', 'unknown setting dpth'),
        ('steps=many', 'steps=many'),
    ],
)
def test_an_argument_that_is_none_is_refused(arg, wanted):
    with pytest.raises(UsageError, match=wanted):
        load_config(arg=arg)


# ---- a run's saved settings ----


def saved(config: ConfigDict) -> dict:
    return json.loads(json.dumps(config.to_dict()))


@pytest.mark.parametrize('arg', ['', '124m', 'depth=12', '70b'])
def test_a_saved_config_is_the_same_config(arg):
    assert configs.differences(saved(load_config(arg=arg)), load_config(arg=arg).to_dict()) == {}


@pytest.mark.parametrize(
    'text',
    [
        'steps=9',
        'log.every=3',
        'eval.rows=5',
        'checkpoint.keep=9',
        'mesh.data=2',
        'eval.prompts=x',
        'log.profile=3',
        'execution.scan=1',
        'execution.remat=full',
    ],
)
def test_what_may_differ_when_a_run_is_resumed(text):
    assert configs.differences(saved(load_config()), load_config(f'--config.{text}').to_dict()) == {}


@pytest.mark.parametrize(
    'text',
    ['seed=1', 'batch_size=4', 'seq_len=64', 'model.dim=64', 'model.window=9', 'optim.lr=1', 'data.mixture=x',
     'z_loss=0', 'execution.microbatch=2', 'init_from=a', 'stage=x',
     'execution.dtype=bfloat16', 'data.tokenizer=x', 'execution.attention=dense'],
)  # fmt: skip
def test_what_must_not_differ_is_named(text):
    key = text.partition('=')[0]
    assert list(configs.differences(saved(load_config()), load_config(f'--config.{text}').to_dict())) == [key]


def test_what_a_run_resolved_stays():
    old = load_config(
        '--config.execution.microbatch=4', '--config.execution.dtype=bfloat16', '--config.execution.attention=cudnn'
    )
    assert configs.differences(saved(old), load_config().to_dict()) == {}
    assert list(configs.differences(saved(old), load_config('--config.execution.microbatch=2').to_dict())) == [
        'execution.microbatch'
    ]


def test_what_the_command_line_chose():
    assert configs.chosen(CONFIG, [('seed', '3')]) == {'seed'}
    assert {'model.dim', 'optim.lr', 'steps'} <= configs.chosen(f'{CONFIG}:depth=12', [('seed', '3')])
    assert 'model.norm_eps' not in configs.chosen(f'{CONFIG}:depth=12', [])


def test_a_branch_takes_the_place_of_the_run_that_a_file_starts_from():
    config, _ = configs.load('configs/sft.py', [('branch_from', 'runs/sft@3')])
    assert config.init_from is None and config.branch_from == 'runs/sft@3'
    with pytest.raises(UsageError, match='two ways to start'):
        configs.load('configs/sft.py', [('branch_from', 'runs/sft@3'), ('init_from', 'runs/pretrain')])
    with pytest.raises(UsageError, match='two ways to start'):
        configs.load('configs/sft.py:init_from=a,branch_from=b')


# ---- a run by name ----


def test_a_step_follows_the_last_at_sign(tmp_path):
    at = tmp_path / 'a@b'
    at.mkdir()
    assert configs.split_run('runs/x') == ('runs/x', None)
    assert configs.split_run('runs/x@12') == ('runs/x', '12')
    assert configs.split_run(str(at)) == (str(at), None)
    assert configs.split_run(f'{at}@3') == (str(at), '3')
    assert configs.split_run('no/such@folder') == ('no/such@folder', None)
    assert configs.split_run(f'{at}@last') == (str(at), 'last')  # the checkpoints say what there is
    (tmp_path / 'a@7').mkdir()
    assert configs.split_run(str(tmp_path / 'a@7')) == (str(tmp_path / 'a@7'), None)
