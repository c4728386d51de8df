"""Settings: a ConfigDict declares them, `--config.KEY=VALUE` changes them, and every mistake is one line.

`--config.*` is read here and not by absl, which answers an unknown key with a traceback, cannot set a field whose value
is None, and makes the string 'None' of None (ml_collections 1.1).
"""

import difflib
import importlib.util
import json
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from etils import epath
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from lm.errors import UsageError

# A ConfigDict. Its fields are declared at run time, by `base`, where no type checker sees them.
Config: TypeAlias = Any

# What may differ when a run is resumed; a key or a whole branch.
MAY_DIFFER = ('steps', 'log', 'eval', 'checkpoint', 'mesh')
OPTIONAL = ('optim.clip', 'beta', 'margin', 'label_smoothing', 'nll')  # may be none, though they have a default
OPTIMIZERS = ('adamw', 'muon', 'adafactor')
SCHEDULES = ('cosine', 'wsd', 'linear', 'constant')
# Settings by the names that other trainers give them, and ours.
ELSEWHERE = {
    **dict.fromkeys(('learning_rate', 'peak_lr', 'max_lr'), 'optim.lr'),
    **dict.fromkeys(('optimizer', 'optimizer_name', 'optim_type'), 'optim.name'),
    **dict.fromkeys(('lr_scheduler_type', 'lr_schedule', 'scheduler'), 'optim.schedule'),
    **dict.fromkeys(('warmup_steps', 'warmup_iters'), 'optim.warmup'),
    **dict.fromkeys(('max_grad_norm', 'grad_clip', 'gradient_clip'), 'optim.clip'),
    **dict.fromkeys(('beta1', 'adam_beta1'), 'optim.b1'),
    **dict.fromkeys(('beta2', 'adam_beta2'), 'optim.b2'),
    **dict.fromkeys(('max_steps', 'max_iters', 'num_steps', 'train_steps', 'total_steps', 'num_iterations'), 'steps'),
    **dict.fromkeys(('batch', 'bsz', 'global_batch_size', 'train_batch_size'), 'batch_size'),
    **dict.fromkeys(
        ('per_device_train_batch_size', 'per_device_batch_size', 'micro_batch_size', 'gradient_accumulation_steps'),
        'microbatch',
    ),
    **dict.fromkeys(
        ('max_length', 'max_seq_length', 'max_seq_len', 'sequence_length', 'context_length', 'block_size'), 'seq_len'
    ),
    **dict.fromkeys(('gradient_checkpointing', 'activation_checkpointing'), 'remat'),
    **dict.fromkeys(('data', 'dataset', 'datasets', 'dataset_name', 'data_path', 'train_file'), 'data.mixture'),
    **dict.fromkeys(('model_name', 'model_name_or_path', 'init_checkpoint', 'pretrained'), 'init_from'),
    **dict.fromkeys(('hidden_size', 'd_model', 'n_embd', 'emb_dim', 'width'), 'model.dim'),
    **dict.fromkeys(('n_layer', 'n_layers', 'num_layers', 'num_hidden_layers', 'depth'), 'model.layers'),
    **dict.fromkeys(('n_head', 'n_heads', 'num_heads', 'num_attention_heads'), 'model.heads'),
    **dict.fromkeys(('intermediate_size', 'mlp_dim', 'd_ff'), 'model.ffn_dim'),
    **dict.fromkeys(('save_steps', 'save_interval', 'save_every'), 'checkpoint.every'),
    **dict.fromkeys(('eval_steps', 'eval_interval', 'eval_every'), 'eval.every'),
    **dict.fromkeys(('logging_steps', 'log_interval', 'log_every'), 'log.every'),
    **dict.fromkeys(('dtype', 'bf16', 'mixed_precision', 'torch_dtype'), 'precision.compute'),
}
INT32_MAX = 2**31 - 1  # counts and places are int32 on the device
SEED_MAX = 2**32 - 1  # a larger seed would be cut to these bits
FLOAT32_END = 2.0**128  # the first number that float32 has no room for
MAX_BATCH_WARMUP = 10**6  # the batch of each of these steps is in a table
MAX_NEW_TOKENS = 10**6  # the cache has a place for each


def base() -> Config:
    """The settings common to all stages, at the sizes of the laptop run. `placeholder(type)` is None until set.

    It is locked: a stage that adds settings says so (`with c.unlocked():`), and a slip of the pen is an error.
    """
    c = ConfigDict()
    c.stage = 'pretrain'
    c.seed = 0
    c.steps = placeholder(int)  # optimizer steps; None: one epoch
    c.batch_size = 8  # sequences a step, over all devices
    c.seq_len = 256  # tokens a sequence
    c.microbatch = placeholder(int)  # sequences in memory at once; None: all of the batch
    c.init_from = placeholder(str)  # DIR[@STEP]: start from that run's weights, model and tokenizer
    c.branch_from = placeholder(str)  # DIR[@STEP]: as init_from, with the optimizer and the position in the data
    c.remat = 'none'  # none | full | dots | names: what the backward pass computes again instead of keeping
    c.attention = placeholder(str)  # blocks | dense | cudnn | splash; None: the platform's own, said when a run starts
    c.loss = 'dpo'  # dpo | cdpo | robust | ipo | simpo | orpo | kto: stage dpo's
    c.beta = placeholder(float)  # how strongly it holds to the reference; None, here and below: the loss's own
    c.margin = placeholder(float)  # by how much simpo has the chosen response lead
    c.label_smoothing = placeholder(float)  # cdpo and robust: the part of labels that are wrong
    c.lambda_d = placeholder(float)  # kto: what a good answer weighs
    c.lambda_u = placeholder(float)  # kto: what a bad answer weighs
    c.nll = placeholder(float)  # coefficient of the chosen responses' own loss beside it
    c.reference = 'cached'  # cached: its log-probs are computed once; live: at each step, beside the model
    c.centring = 1e-2  # stage reward's: coefficient of (chosen + rejected)²
    c.margins = 0.0  # stage reward's: what a pair's margin is multiplied by; 0: the better one need only lead
    c.z_loss = 1e-4  # coefficient of the squared logsumexp
    c.precision = ConfigDict()
    c.precision.compute = placeholder(str)  # dtype of activations; None: bfloat16, on CPU float32

    c.model = _model()

    c.optim = ConfigDict()
    c.optim.name = 'adamw'  # adamw | muon (for matrices, AdamW for the rest) | adafactor
    c.optim.lr = 6e-3
    c.optim.schedule = 'linear'  # cosine | wsd | linear | constant, each after the warmup
    c.optim.warmup = 100  # steps
    c.optim.batch_warmup = 0  # steps over which the batch grows from one microbatch to batch_size
    c.optim.decay = 0.2  # wsd: the last part of the run over which the rate falls to the final one
    c.optim.final = 0.0  # the last rate, as a fraction of lr
    c.optim.weight_decay = 0.1  # not on norms and embeddings
    c.optim.clip = placeholder(float)
    c.optim.clip = 1.0  # global gradient norm; None: off
    c.optim.b1 = 0.9
    c.optim.b2 = 0.95
    c.optim.eps = 1e-8
    c.optim.momentum = 0.95  # muon's, of the matrices
    c.optim.ema = placeholder(float)  # decay of an average of the weights, which is then what is evaluated and used
    c.optim.max_skips = 5  # non-finite steps in a row that are skipped before the run stops

    c.data = ConfigDict()
    c.data.mixture = ''  # 'name:weight,…': botocore, files, folders, tfds:NAME, hf:NAME; see lm/data/sources.py
    c.data.tokenizer = placeholder(str)  # folder or tokenizer.json; None: trained on the mixture, or init_from's
    c.data.pretraining = placeholder(str)  # after pretraining: its mixture, '' none; None: that of the run before
    c.data.replay = 0.0  # after pretraining: share of the rows that are its text, against forgetting
    c.data.strict = False  # a malformed record ends the run with a line that names it; else it is left out and counted
    c.data.heldout = 0.02  # part of each source's documents that is kept out for evaluation

    c.mesh = ConfigDict({'data': 1, 'fsdp': -1, 'seq': 1, 'tensor': 1, 'expert': 1})  # -1 takes the devices left

    c.checkpoint = ConfigDict()
    c.checkpoint.every = 100  # steps
    c.checkpoint.keep = 3

    c.eval = ConfigDict()
    c.eval.every = 250  # steps; the last step is always evaluated
    c.eval.rows = 256  # held-out rows of each source
    c.eval.prompts = placeholder(str)  # a .jsonl file; None: configs/prompts.jsonl, of own data its held-out beginnings
    c.eval.max_new_tokens = 48

    c.log = ConfigDict()
    c.log.every = 10  # steps between lines of metrics.jsonl
    c.log.profile = placeholder(int)  # step from which three steps are traced into DIR/profile
    return c.lock()


def _model() -> ConfigDict:
    """The graph, and its sizes: the fields of `lm.model.config.ModelConfig`."""
    m = ConfigDict()
    m.vocab_size = 4096
    m.dim = 128
    m.layers = 4
    m.heads = 4
    m.kv_heads = 4
    m.head_dim = 32
    m.ffn_dim = 384
    m.rope_theta = 10_000.0
    m.norm_eps = 1e-6
    m.qk_norm = True  # RMS-normalise queries and keys per head
    m.qk_norm_joint = False  # … over all heads at once (OLMo 2)
    m.tied = True  # one matrix for the embedding and the head
    m.qkv_bias = False  # Qwen 2
    m.norms = 'pre'  # pre | post (OLMo 2) | both (Gemma 2 and 3): of what a sub-layer reads, of what it adds
    m.norm_plus_one = False  # norms multiply by 1 + their weight (Gemma)
    m.activation = 'silu'  # silu | gelu
    m.window = placeholder(int)  # attend to this many last tokens in local layers; None: all
    m.pattern = placeholder(str)  # 'local,global', with nope: repeated over the layers; None: all by window
    m.rope_theta_local = placeholder(float)  # of a pattern's local layers; None: rope_theta
    m.rope_scaling = placeholder(str)  # 'linear,factor=8' | 'llama3,factor=8,low=1,high=4,original=8192'
    m.query_scale = placeholder(float)  # what q·k is multiplied by; None: 1/√head_dim
    m.embed_scale = placeholder(float)  # Gemma, Granite
    m.residual_scale = placeholder(float)  # of what is added to the residual stream (Granite)
    m.logit_scale = placeholder(float)  # Granite
    m.context = placeholder(int)  # tokens that it was made to read at once; None: seq_len
    m.attn_softcap = placeholder(float)
    m.logit_softcap = placeholder(float)
    m.scan = False  # scan over layers (compiles faster, for deep models) or unroll them (runs faster on CPU)
    return m


# ---- reading the command line ----


def split_settings(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """(the words that are no settings, the pairs KEY, VALUE of `--config.KEY=VALUE`).

    Raises UsageError if one has no value.
    """
    words, settings = [], []
    rest = iter(argv)
    for word in rest:
        if not word.startswith('--config.'):
            words.append(word)
            continue
        key, equals, text = word.removeprefix('--config.').partition('=')
        if not equals:
            text = next(rest, None)
            if text is None:
                raise UsageError(f'--config.{key} has no value: write --config.{key}=VALUE')
        settings.append((key, text))
    return words, settings


def leaves(config: Config, prefix: str = '') -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every setting."""
    for key, value in config.items():
        if isinstance(value, Mapping | ConfigDict):
            yield from leaves(value, f'{prefix}{key}.')
        else:
            yield prefix + key, value


def nearest(word: str, words: Sequence[str]) -> str:
    """' (did you mean X?)' with the nearest of the words, upper and lower case alike, or ''."""
    lower = {w.lower(): w for w in reversed(words)}
    found = difflib.get_close_matches(word.lower(), list(lower), n=1, cutoff=0.5)
    return f' (did you mean {lower[found[0]]}?)' if found else ''


def parse_value(key: str, text: str, kind: type, optional: bool) -> Any:
    """Reads `text` as the declared type. '1e3' is an int where exact; 'none' is None where None is allowed."""
    if text.lower() == 'none' and optional:
        return None
    try:
        if kind is bool:
            return {'true': True, 'false': False, '1': True, '0': False}[text.lower()]
        if kind is int:
            number = float(text)
            if number != int(number):
                raise ValueError
            return int(text) if text.lstrip('+-').isdigit() else int(number)
        return kind(text)
    except (ValueError, KeyError, OverflowError):
        wanted = {int: 'a whole number', float: 'a number', bool: 'true or false'}.get(kind, kind.__name__)
        raise UsageError(f'{key}={text}: must be {wanted}{" or none" if optional else ""}') from None


def whole(flag: str) -> Callable[[str], int]:
    """Reads a command's flag as a setting is read ('1e3' is 1000), for argparse's `type`."""
    return lambda text: parse_value(flag, text, int, False)


def override(config: Config, key: str, text: str) -> None:
    """Sets one dotted key from its text. Raises UsageError for an unknown key (naming the nearest) or a wrong type."""
    known = dict(leaves(config))
    if key not in known:
        raise UsageError(f'unknown setting {key}{_nearest_setting(key, list(known))}')
    *parents, last = key.split('.')
    node = config
    for parent in parents:
        node = node[parent]
    optional = key in OPTIONAL or dict(leaves(base())).get(key, known[key]) is None
    node[last] = parse_value(key, text, node.get_type(last), optional)


def _nearest_setting(key: str, known: Sequence[str]) -> str:
    """As `nearest`, of a setting: first by the last part of its name, then by its name elsewhere."""
    last = key.lower().rsplit('.', 1)[-1].replace('-', '_')
    last = ELSEWHERE.get(last, last)
    by_last = [k for k in known if last in (k, k.rsplit('.', 1)[-1])]
    return f' (did you mean {by_last[0]}?)' if by_last else nearest(key, known)


def load(path_and_arg: str, overrides: Sequence[tuple[str, str]] = ()) -> tuple[Config, str]:
    """Reads `configs/STAGE.py[:ARG]` and applies the overrides: (the config, ARG).

    Raises UsageError if there is no such file, it has no `get_config` or fails, or a key or value is wrong.
    """
    path, arg = _split_arg(path_and_arg)
    config = _run_file(path, arg)
    for key, text in overrides:
        override(config, key, text)
    check(config)
    return config, arg


def chosen(path_and_arg: str, overrides: Sequence[tuple[str, str]]) -> set[str]:
    """The settings that the command line names, or that its ARG moves."""
    path, arg = _split_arg(path_and_arg)
    plain, moved = (dict(leaves(_run_file(path, a))) for a in ('', arg))
    return {key for key, _ in overrides} | {key for key in moved if moved[key] != plain.get(key)}


def _split_arg(path_and_arg: str) -> tuple[str, str]:
    """'configs/pretrain.py:124m' -> ('configs/pretrain.py', '124m')."""
    path, colon, arg = path_and_arg.partition('.py:')
    return (f'{path}.py', arg) if colon else (path, '')


def _run_file(path: str, arg: str) -> Config:
    """What the file's get_config(arg) gives."""
    file = Path(path)
    if not file.is_file():
        raise UsageError(f'--config={path}: no such file (a stage is configs/pretrain.py, from a checkout of lm)')
    spec = importlib.util.spec_from_file_location('lm_config', file)
    if spec is None or spec.loader is None:
        raise UsageError(f'--config={path}: not a Python file')
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if 'get_config' not in vars(module):
            raise UsageError(f'--config={path}: has no function get_config(arg)')
        return module.get_config(arg)
    except UsageError:
        raise
    except Exception as error:  # whatever a person's own file does; a name, a place and a reason fit one line
        raise UsageError(f'--config={path}{_line_in(file, error)}: {type(error).__name__}: {error}') from error


def _line_in(file: Path, error: Exception) -> str:
    """':LINE' of the last place in the file that an error passed, or ''."""
    if isinstance(error, SyntaxError):
        return f':{error.lineno}'
    frames = traceback.extract_tb(error.__traceback__)
    return next((f':{f.lineno}' for f in reversed(frames) if Path(f.filename) == file), '')


def check(config: Config) -> None:
    """Raises UsageError for values that no run can have, whatever its data and devices."""
    values = dict(leaves(config))
    bounds = {
        f'from 1 to {INT32_MAX}': (
            lambda x: 1 <= x <= INT32_MAX,
            'batch_size seq_len steps microbatch checkpoint.every checkpoint.keep eval.every eval.rows '
            'log.every model.window model.context model.vocab_size model.dim model.layers model.heads '
            'model.kv_heads model.head_dim model.ffn_dim',
        ),
        f'from 0 to {INT32_MAX}': (lambda x: 0 <= x <= INT32_MAX, 'optim.warmup optim.max_skips log.profile'),
        f'from 0 to {MAX_BATCH_WARMUP}': (lambda x: 0 <= x <= MAX_BATCH_WARMUP, 'optim.batch_warmup'),
        f'from 1 to {MAX_NEW_TOKENS}': (lambda x: 1 <= x <= MAX_NEW_TOKENS, 'eval.max_new_tokens'),
        'positive and finite': (
            lambda x: 0 < x < FLOAT32_END,
            'optim.lr optim.clip optim.eps model.norm_eps model.attn_softcap model.logit_softcap beta '
            'model.query_scale model.embed_scale model.residual_scale model.logit_scale',
        ),
        'at least 1 and finite': (lambda x: 1 <= x < FLOAT32_END, 'model.rope_theta model.rope_theta_local'),
        'at least 0 and finite': (
            lambda x: 0 <= x < FLOAT32_END,
            'z_loss optim.weight_decay margin nll centring margins lambda_d lambda_u',
        ),
        'from 0 to 1': (lambda x: 0 <= x <= 1, 'optim.decay optim.final'),
        'from 0 to below 1': (lambda x: 0 <= x < 1, 'optim.b1 optim.b2 optim.momentum'),
        'from 0 to 0.9': (lambda x: 0 <= x <= 0.9, 'data.replay'),
        'between 0 and 1': (lambda x: 0 < x < 1, 'data.heldout optim.ema'),
        f'from 0 to {SEED_MAX}': (lambda x: 0 <= x <= SEED_MAX, 'seed'),
    }
    for words, (holds, keys) in bounds.items():
        for key in keys.split():
            if values[key] is not None and not holds(values[key]):
                raise UsageError(f'{key}={values[key]} must be {words}')
    choices = {
        'precision.compute': (None, 'float32', 'bfloat16'), 'optim.name': OPTIMIZERS, 'optim.schedule': SCHEDULES,
        'attention': (None, 'blocks', 'dense', 'cudnn', 'splash'),
    }  # fmt: skip
    for key, allowed in choices.items():
        if values[key] not in allowed:
            hint = nearest(str(values[key]), [a for a in allowed if a])
            raise UsageError(f'{key}={values[key]}{hint} is not one of {", ".join(map(str, allowed))}')
    if config.batch_size * config.seq_len > INT32_MAX:
        raise UsageError(
            f'batch_size={config.batch_size} × seq_len={config.seq_len} must be at most {INT32_MAX} tokens a step'
        )
    if config.microbatch and config.batch_size % config.microbatch:
        raise UsageError(f'batch_size={config.batch_size} is not a multiple of microbatch={config.microbatch}')
    if config.optim.batch_warmup and (config.microbatch or config.batch_size) == config.batch_size:
        raise UsageError(
            f'optim.batch_warmup={config.optim.batch_warmup} grows the batch by microbatches: set microbatch below '
            f'batch_size={config.batch_size}'
        )
    if config.init_from and config.branch_from:
        raise UsageError('init_from and branch_from are two ways to start: set one of them')


# ---- a run's saved settings ----


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{key: (old, new)} of the settings that differ and must not when a run is resumed.

    What the run resolved for itself (None in `new`) stays as it is saved; None for `attention` is the choice of the
    platform that the run goes on on.
    """
    a, b = dict(leaves(base())) | dict(leaves(old)), dict(leaves(new))  # a setting newer than the run has its default
    fixed = [k for k in a | b if k.split('.')[0] not in MAY_DIFFER and k not in MAY_DIFFER]
    plain: Callable[[Any], Any] = lambda v: json.loads(json.dumps(v))
    resolved = ('microbatch', 'precision.compute', 'attention')
    return {
        k: (a.get(k), b.get(k))
        for k in fixed
        if plain(a.get(k)) != plain(b.get(k)) and not (k in resolved and b.get(k) is None)
    }


# ---- a run by name ----


def split_run(run: str) -> tuple[str, str | None]:
    """'DIR@STEP' -> (DIR, STEP), 'DIR' -> (DIR, None). A folder's own name may have an @ in it."""
    folder, at, step = run.rpartition('@')
    if not at or epath.Path(run).exists():
        return run, None
    return (folder, step) if step.isdecimal() or epath.Path(folder).exists() else (run, None)
