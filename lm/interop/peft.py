"""Adapters of the package peft in and out: adapter_config.json and adapter_model.safetensors.

Nothing of peft is needed. Elsewhere a file whose names do not fit loads in silence and changes nothing; here every
tensor of a file has its place in the model, every matrix that has one factor has the other, and what we cannot express
is refused by its name.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from etils import epath

from lm import files
from lm.errors import UsageError
from lm.interop.adapter import OpenedAdapter, check_factors, stack_of
from lm.interop.graph import DTYPES, Fetch, Info, matrices_of
from lm.interop.huggingface import families, family_config
from lm.interop.huggingface import safetensors_file as file
from lm.interop.opened import Leaf, Opened

CONFIG, WEIGHTS = 'adapter_config.json', 'adapter_model.safetensors'
PREFIX = 'base_model.model.'  # before each name of the model
SMALL_FILE = 1 << 20  # bytes: a larger adapter_config.json is none
PARTS = {'lora_A.weight': 'a', 'lora_B.weight': 'b', 'lora_magnitude_vector': 'magnitude'}
SCORE = 'score'
UNSET = 8  # of r and lora_alpha, where a file does not say them
# What makes another model of it, by the values that do not; nothing at all is one, too.
REFUSED: dict[str, tuple[Any, ...]] = {
    'bias': ('none',), 'fan_in_fan_out': (False,), 'lora_bias': (False,), 'layer_replication': (),
    'use_qalora': (False,), 'kasa_config': (), 'arrow_config': (), 'velora_config': (), 'monteclora_config': (),
    'use_bdlora': (False,),
    'alora_invocation_tokens': (), 'target_parameters': ([],), 'trainable_token_indices': ([], {}),
    'ensure_weight_tying': (False,), 'megatron_config': (),
}  # fmt: skip
# How training began is past, but where the base was changed for it: such factors hold over another base.
PLAIN_STARTS = ('gaussian', 'eva', 'orthogonal', 'lora_ga')
# What says nothing of the weights, or what the tensors say anyway.
KNOWN = {
    *REFUSED, 'peft_type', 'task_type', 'base_model_name_or_path', 'r', 'lora_alpha', 'use_rslora', 'use_dora',
    'rank_pattern', 'alpha_pattern', 'target_modules', 'modules_to_save', 'init_lora_weights', 'auto_mapping',
    'peft_version', 'revision', 'inference_mode', 'lora_dropout', 'layers_to_transform', 'layers_pattern',
    'exclude_modules', 'loftq_config', 'eva_config', 'corda_config', 'lora_ga_config', 'megatron_core',
    'qalora_group_size', 'runtime_config',
}  # fmt: skip


# ---- reading ----


def open_adapter(path: epath.PathLike, base: Opened, *, fetch: Fetch = file.read) -> OpenedAdapter:
    """The adapter in a folder, over a model that it fits.

    Raises UsageError for what we cannot express, for tensors that have no place in the model or are not whole, and for
    another model's.

    Args:
      fetch: reads a tensor.
    """
    folder, where = epath.Path(path), str(path)
    told = _config(folder / CONFIG)
    notes = [f'{where}: {key} in {CONFIG} is not known, and was ignored' for key in sorted(set(told) - KNOWN)]
    if not (folder / WEIGHTS).exists():
        raise UsageError(f'{where}: has no {WEIGHTS}: a pickled one runs code, save it as safetensors elsewhere')
    family = _family(base)
    matrices = matrices_of(family.layer, base.model['layers'])
    places = {name.removesuffix('.weight'): place for name, place in matrices.items()}
    found: dict[str, dict[int, dict[str, Info]]] = defaultdict(lambda: defaultdict(dict))
    arrays = {}
    for name, info in file.read_header(folder / WEIGHTS).items():
        module, part = _module(name, where)
        if module == SCORE and part == 'weight' and told.get('task_type') == 'SEQ_CLS':
            arrays |= _score(info, base, where, fetch)
        elif part not in PARTS or module not in places:
            raise UsageError(f"{where}: the tensor {name!r} is of no matrix of {base.where}: it is another model's")
        else:
            leaf, layer = places[module]
            found[leaf][layer][PARTS[part]] = info
    if not found:
        raise UsageError(f'{where}: has no factors in {WEIGHTS}')
    names, stacks = {place: module for module, place in places.items()}, {}
    parts = ('a', 'b', 'magnitude') if told.get('use_dora') else ('a', 'b')
    for leaf, layers in found.items():
        check_factors(leaf, layers, base, parts, where)
        scales = {i: _scale(told, where, notes, names[leaf, i], x['a'].shape[0]) for i, x in layers.items()}
        stacks[f'layers/{leaf}'] = stack_of(leaf, layers, base, scales, fetch, where)
    _check_targets(told, {m for m, (leaf, i) in places.items() if i in found.get(leaf, {})}, set(places), where)
    scored = bool(arrays)
    return OpenedAdapter(where, str(told.get('base_model_name_or_path')), stacks, arrays, scored, tuple(notes))


def base_of(path: epath.PathLike) -> str:
    """Names the model under the adapter as a folder's adapter_config.json does."""
    return str(_config(epath.Path(path) / CONFIG).get('base_model_name_or_path'))


def _config(path: epath.Path) -> dict[str, Any]:
    """adapter_config.json. Raises UsageError for what is not of a LoRA that we can express."""
    try:
        text = path.read_text() if path.stat().length <= SMALL_FILE else ''
        told = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f'{path} cannot be read ({error}): get it again') from None
    if not isinstance(told, dict):
        raise UsageError(f'{path} is damaged (no object): get it again')
    if told.get('peft_type') != 'LORA':
        raise UsageError(f'{path}: peft_type={told.get("peft_type")}: LORA is read')
    for key, fine in REFUSED.items():
        if told.get(key) is not None and told[key] not in fine:
            raise UsageError(f'{path}: {key}={_short(told[key])} has no place in our adapters')
    start = told.get('init_lora_weights', True)
    if not isinstance(start, bool | None) and start not in PLAIN_STARTS:
        raise UsageError(
            f"{path}: init_lora_weights={_short(start)} changed the base: save it with peft's "
            'path_initial_model_for_weight_conversion, as a plain LoRA'
        )
    saved = told.get('modules_to_save') or []
    if told.get('task_type') == 'SEQ_CLS':
        saved = [name for name in saved if name not in (SCORE, 'classifier')]
    if saved:
        raise UsageError(f'{path}: modules_to_save={_short(saved)}: only the score of a reward model is read')
    for key in ('rank_pattern', 'alpha_pattern'):
        if not isinstance(told.get(key) or {}, dict) or not all(map(_number, (told.get(key) or {}).values())):
            raise UsageError(f'{path} is damaged ({key} is no table of numbers)')
    for key in ('r', 'lora_alpha'):
        if not _number(told.get(key, UNSET)):
            raise UsageError(f'{path} is damaged ({key}={_short(told[key])} is no number)')
    return told


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _short(value: Any) -> str:
    return json.dumps(value)[:80]


def _module(name: str, where: str) -> tuple[str, str]:
    """('model.layers.0.self_attn.q_proj', 'lora_A.weight') of a tensor's name, with the prefix or without, with an
    adapter's name in it or without."""
    name = name.removeprefix(PREFIX).replace('.modules_to_save.default.', '.').replace('.modules_to_save.', '.')
    match = re.fullmatch(r'(.+)\.(lora_[AB]|lora_magnitude_vector)(?:\.default)?((?:\.weight)?)', name)
    if match:
        return match[1], 'lora_magnitude_vector' if match[2] == 'lora_magnitude_vector' else match[2] + match[3]
    module, _, part = name.rpartition('.')
    return module, part


def _family(base: Opened) -> families.Family:
    return family_config.choose(base.model, scored=base.scored)[0]


def _score(info: Info, base: Opened, where: str, fetch: Fetch) -> dict[str, Leaf]:
    """The score of a reward model; peft's has no bias."""
    dim = base.model['dim']
    if info.shape != (1, dim) or info.kind not in DTYPES:
        raise UsageError(f'{where}: the tensor {info.name!r} is {info.kind} {info.shape}, a score is (1, {dim})')
    f32 = np.dtype(np.float32)
    return {
        'score_D': Leaf((dim,), f32, None, lambda _: fetch(info).astype(f32).reshape(dim)),
        'bias_score': Leaf((), f32, None, lambda _: np.zeros((), f32)),
    }


def _scale(told: Mapping[str, Any], where: str, notes: list[str], module: str, rank: int) -> float:
    """The factor of B·A for a module. Raises UsageError for a rank that is not the tensors', and for an alpha of 0."""
    own = {}
    for key, plain in (('rank_pattern', told.get('r', UNSET)), ('alpha_pattern', told.get('lora_alpha', UNSET))):
        table = told.get(key) or {}
        matching = [name for name in table if _matches(name, module, where)]
        if len({table[name] for name in matching}) > 1:
            note = f'{where}: {" and ".join(matching)} of {key} are of one module: the first in the file was taken'
            notes += [note] if note not in notes else []
        own[key] = table[matching[0]] if matching else plain
    if own['rank_pattern'] != rank:
        raise UsageError(f'{where}: {module} has a rank of {rank}, and {CONFIG} says {own["rank_pattern"]}')
    if not own['alpha_pattern']:
        raise UsageError(f'{where}: lora_alpha=0: an adapter that is multiplied by 0 changes nothing')
    return own['alpha_pattern'] / (rank**0.5 if told.get('use_rslora') else rank)


def _matches(pattern: str, module: str, where: str) -> bool:
    """Tells whether a key of a pattern names a module, as peft does: an expression for the end of its dotted name."""
    if len(pattern) > 200 or re.search(r'[)*+}]\s*[*+{]|\\[1-9]|\(\?', pattern):  # a stranger's, it might run for long
        raise UsageError(f'{where}: the pattern {pattern[:80]!r} repeats what repeats: name the modules')
    try:
        return re.match(rf'(.*\.)?({pattern})$', module) is not None
    except re.error as error:
        raise UsageError(f'{where}: the pattern {pattern!r} is no expression ({error})') from None


def _check_targets(told: Mapping[str, Any], have: set[str], all_of: set[str], where: str) -> None:
    """Raises UsageError for a module that `target_modules` names and that has no factors."""
    targets, layers = told.get('target_modules'), told.get('layers_to_transform')
    if not isinstance(targets, list):  # an expression, whose modules were written out as they were found
        return
    excluded = told.get('exclude_modules') or []
    excluded = excluded if isinstance(excluded, list) else [excluded]
    ends = lambda module, names: any(module == n or module.endswith(f'.{n}') for n in names if isinstance(n, str))
    layers = [layers] if isinstance(layers, int) else layers
    for module in sorted(all_of - have):
        chosen = layers is None or int(module.split('.')[2]) in layers
        if chosen and ends(module, targets) and not ends(module, excluded):
            raise UsageError(f'{where}: target_modules names {module}, of which {WEIGHTS} has no factors')


# ---- writing ----


def write_adapter(adapter: OpenedAdapter, base: Opened, path: epath.PathLike, *, say: Callable[[str], None]) -> None:
    """Writes a folder that peft loads over the model `base` as `lm.convert` writes that; it appears at once or not at
    all. Every factor is in float32, and what multiplies it is in B where one number for all would not do.

    Raises UsageError if the folder exists or no architecture is this graph.
    """
    folder = epath.Path(path).expanduser()
    if folder.exists():
        raise UsageError(f'{path} exists: name a new folder')
    family, ranks, alpha = _family(base), adapter.ranks(), adapter.alpha()
    rank = max(ranks.values())
    modules = {name: family.layer[name].removesuffix('.weight') for name in ranks}
    names, tensors = {part: name for name, part in PARTS.items()}, {}
    for name, layer, parts in adapter.stored(alpha):
        place = PREFIX + modules[name].format(layer=layer)
        tensors |= {f'{place}.{names[part]}': x for part, x in parts.items()}
    if adapter.scored:
        tensors[f'{PREFIX}{SCORE}.weight'] = np.asarray(adapter.arrays['score_D'].read(0), np.float32)[None]
        say(f'the score has a bias of {float(adapter.arrays["bias_score"].read(0)):.6g}, which peft has no place for')
    adapted = [name.removeprefix(PREFIX) for name in tensors if '.lora_A.' in name]
    told = {
        'peft_type': 'LORA', 'task_type': 'SEQ_CLS' if adapter.scored else 'CAUSAL_LM', 'r': rank,
        'lora_alpha': int(alpha) if float(alpha).is_integer() else alpha, 'use_rslora': False,
        'use_dora': any(name.endswith(names['magnitude']) for name in tensors), 'bias': 'none',
        'target_modules': [name.removesuffix(f'.{names["a"]}') for name in adapted],
        'modules_to_save': [SCORE] if adapter.scored else None,
        'rank_pattern': {modules[name].rpartition('.')[2]: r for name, r in ranks.items() if r != rank},
        'fan_in_fan_out': False, 'inference_mode': True, 'init_lora_weights': True, 'lora_dropout': 0.0,
        'base_model_name_or_path': adapter.base,
    }  # fmt: skip
    say(f'{WEIGHTS}: {len(tensors)} tensors; its base for peft: python -m lm.convert {adapter.base} FOLDER')
    with files.new_folder(folder) as made:
        files.write_json(made / CONFIG, told)
        with files.streamed(made / WEIGHTS) as write:
            write(file.header({name: ('F32', x.shape) for name, x in tensors.items()}))
            for x in tensors.values():
                write(np.ascontiguousarray(x, np.float32).tobytes())
