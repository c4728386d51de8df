"""Folders of Hugging Face's in and out: config.json, safetensors, and the tokenizer's files.

Neither torch nor `transformers` is needed, and nothing that a folder brings along is run. Tensors are read one by one
when they are asked for, and written in pieces, so that memory holds one of them.
"""

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from etils import epath

from lm import files, progress
from lm.data.tokenizer import JSON_FILE, MODEL_FILE
from lm.errors import UsageError
from lm.interop import graph
from lm.interop.graph import DTYPES, Fetch, Info, Tensor
from lm.interop.huggingface import families, family_config
from lm.interop.huggingface import safetensors_file as file
from lm.interop.huggingface.families import Family
from lm.interop.huggingface.family_config import Described
from lm.interop.opened import Leaf, Opened
from lm.interop.tokenizers import files as tokenizer_files

CONFIG, WEIGHTS, INDEX = 'config.json', 'model.safetensors', 'model.safetensors.index.json'
SHARD = 5_000_000_000  # of a file of weights
IGNORED = ('rotary_emb.inv_freq', 'masked_bias')  # old files' copies of what follows from config.json
PEFT = 'base_model.'  # before the names of a model that has an adapter
BIAS, MEAN, STD = 'reward_bias', 'reward_mean', 'reward_std'  # keys of ours in config.json: theirs have none
SMALL_FILE = 64 << 20  # bytes: no tokenizer's file is larger
_WORDS = (
    'tokenizer.json', 'tokenizer.model', 'tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json',
    'chat_template.jinja', 'chat_template.json', 'generation_config.json', CONFIG,
)  # fmt: skip

# ---- reading ----


def open_folder(path: epath.PathLike, *, fetch: Fetch = file.read) -> Opened:
    """A folder of one of the architectures in `families.FAMILIES`. Raises UsageError for what we cannot express.

    Args:
      fetch: reads a tensor.
    """
    from lm.interop.tokenizers import conversion as tokenizers

    folder, where = epath.Path(path), str(path)
    if not (folder / CONFIG).exists():
        raise UsageError(f'{where}: has no {CONFIG}: name a folder that transformers has saved')
    config = _object(folder / CONFIG)
    told = family_config.describe(config, f'{where}/{CONFIG}')
    tensors = _text_model(_tensors(folder), told, where)
    _check_names(tensors, where)
    leaves, notes = _leaves(tensors, told, where, fetch)
    if told.scored:
        bias = np.array(_number(config, BIAS, where) or 0, np.float32)
        leaves['bias_score'] = Leaf((), bias.dtype, None, lambda _: bias)
        notes += [] if BIAS in config else [f'{where}: has no bias of its score: it is 0']
    if told.vision:
        notes.append(f'{where}: the text model was taken, and what reads images was left out')
    words = {name: _small(folder / name) for name in _WORDS if (folder / name).exists()}
    if {JSON_FILE, MODEL_FILE} & set(words):
        words, more = tokenizer_files.fitted(tokenizers.from_huggingface(words), told.model['vocab_size'])
        notes += [f'{where}: {note}' for note in (*more, *tokenizer_files.unfollowed(words))]
    else:
        words, notes = {}, [*notes, f'{where}: has no tokenizer']
    scale = _scale(config, where) if told.scored else None
    return Opened(where, told.model, leaves, words, scored=told.scored, scale=scale, notes=tuple(notes))


def _object(path: epath.Path) -> dict[str, Any]:
    """The JSON object of a small file."""
    try:
        found = json.loads(_small(path))
    except (ValueError, RecursionError) as error:
        raise UsageError(f'{path} is damaged ({error}): get it again') from None
    if not isinstance(found, dict):
        raise UsageError(f'{path} is damaged (no object): get it again')
    return found


def _small(path: epath.Path) -> bytes:
    try:
        with path.open('rb') as f:
            content = f.read(SMALL_FILE + 1)  # a device has no length of its own
        if len(content) > SMALL_FILE:
            raise UsageError(f'{path} has more than {SMALL_FILE} bytes: it is not what its name says')
        return content
    except OSError as error:
        raise UsageError(f'{path}: cannot be read ({error.strerror or error})') from None


def _tensors(folder: epath.Path) -> dict[str, Info]:
    """{name: tensor} of all of a folder's files of weights."""
    if (folder / WEIGHTS).exists():
        return file.read_header(folder / WEIGHTS)
    if not (folder / INDEX).exists():
        if any(list(folder.glob(pattern)) for pattern in ('*.bin', '*.pt', '*.pth')):
            raise UsageError(
                f'{folder}: has pickled weights alone, which run code when they are read: load them with transformers '
                'and save_pretrained(…, safe_serialization=True) elsewhere'
            )
        raise UsageError(f'{folder}: has neither {WEIGHTS} nor {INDEX}')
    places = _object(folder / INDEX).get('weight_map')
    if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        raise UsageError(f'{folder / INDEX}: has no weight_map of names to files')
    headers = {shard: file.read_header(_shard(folder, shard)) for shard in sorted(set(places.values()))}
    for name, shard in places.items():
        if name not in headers[shard]:
            raise UsageError(f'{folder / shard}: has no tensor {name!r}, which {INDEX} says it has')
    if sum(map(len, headers.values())) != len({name for header in headers.values() for name in header}):
        raise UsageError(f'{folder}: a tensor is in two of its files: get the folder again')
    return {name: info for header in headers.values() for name, info in header.items()}


def _shard(folder: epath.Path, name: str) -> epath.Path:
    """A shard's path. Its name may not lead out of the folder; a link may, as the hub's own cache is made of links, and
    what made the link is not the file that names it."""
    if '/' in name or '\\' in name or '\0' in name or not name.endswith('.safetensors'):
        raise UsageError(f'{folder / INDEX}: {name[:80]!r} is not the name of a file in the folder')
    if not (folder / name).exists():
        raise UsageError(f'{folder}: has no {name}, which {INDEX} names: get it, too')
    return folder / name


def _text_model(tensors: Mapping[str, Info], told: Described, where: str) -> Mapping[str, Info]:
    """{name that a text model has: tensor}, whatever holds the text model beside others."""
    if not told.vision:
        return tensors
    own = {}
    for theirs, ours in families.VISION_PREFIXES.items():
        own |= {ours + name.removeprefix(theirs): x for name, x in tensors.items() if name.startswith(theirs)}
    if not own:
        raise UsageError(f'{where}: has no text model ({" or ".join(families.VISION_PREFIXES)}…)')
    return own


def _check_names(names: Collection[str], where: str) -> None:
    """Raises UsageError for tensors that are called otherwise than the same model's own: what they say, and what to do
    about it."""
    first = families.TOP['embed_VD']
    if first in names:
        return
    if adapted := next((name for name in names if '.lora_' in name or name.startswith(PEFT)), None):
        raise UsageError(f'{where}: holds a model with an adapter in it ({adapted}): merge it first (merge_and_unload)')
    wrapped = next((name for name in names if name.endswith(f'.{first}')), None)
    if wrapped:
        prefix = wrapped.removesuffix(first)
        raise UsageError(f'{where}: its tensors begin with {prefix!r}: save the model that is wrapped in it')
    if first.removeprefix('model.') in names:
        raise UsageError(f"{where}: its tensors lack the beginning 'model.': save the ForCausalLM that it belongs to")


def _leaves(
    tensors: Mapping[str, Info], told: Described, where: str, fetch: Fetch
) -> tuple[dict[str, Leaf], list[str]]:
    """(the parameters, notes). Raises UsageError for tensors that are not of the graph that config.json describes."""
    read = partial(
        graph.read_leaves, tensors=tensors, model=told.model, shaped_by=f'{CONFIG} makes it', dtypes=DTYPES,
        read=lambda info, leaf, shape: graph.from_stored(fetch(info), leaf, shape),
    )  # fmt: skip
    zeros = _zeros(told.family, told.model)
    names = graph.names_of(_names(told.family, told.model, scored=told.scored), told.model['layers'])
    leaves, notes = read(names, where=where), []
    for name in zeros:
        if name in tensors and np.any(fetch(tensors[name])):
            raise UsageError(f'{where}: the tensor {name!r} is not zero, and a bias of the output is not in our graph')
    head = families.HEAD['head_DV']
    if told.model['tied'] and head in tensors and told.scored:
        notes = [f'{head} was left out: no score is made of it']
    elif told.model['tied'] and head in tensors and not _same(tensors[head], tensors[families.TOP['embed_VD']], fetch):
        told.model['tied'] = False  # as it is for transformers 5
        leaves |= read({'head_DV': [head]}, where=head)
        notes = [f'{head} differs from the embedding, so the two are not tied, whatever {CONFIG} says']
    graph.check_surplus(set(tensors).difference([head], zeros, *names.values()), IGNORED, where)
    return leaves, notes


def _same(a: Info, b: Info, fetch: Fetch) -> bool:
    """Tells whether two tensors are the same bit for bit."""
    alike = (a.shape, a.kind) == (b.shape, b.kind)
    return alike and np.array_equal(fetch(a).view(np.uint8), fetch(b).view(np.uint8))


def _names(family: Family, model: Mapping[str, Any], *, scored: bool) -> dict[str, str]:
    """{parameter: the pattern of its tensor's name}."""
    top = families.TOP | ({} if model['tied'] else families.HEAD) | (families.SCORE if scored else {})
    return top | family.layer


def _number(config: Mapping[str, Any], key: str, where: str) -> float | None:
    value = config.get(key)
    if value is not None and (type(value) not in (int, float) or not math.isfinite(value)):
        raise UsageError(f'{where}/{CONFIG}: {key}={value!r} is not a number')
    return value


def _scale(config: Mapping[str, Any], where: str) -> tuple[float, float] | None:
    mean, std = _number(config, MEAN, where), _number(config, STD, where)
    if mean is None or std is None:
        return None
    if std <= 0:
        raise UsageError(f'{where}/{CONFIG}: {STD}={std!r} is not positive')
    return mean, std


# ---- writing ----


def write_folder(opened: Opened, path: epath.PathLike, *, say: Callable[[str], None]) -> None:
    """Writes a folder that `transformers` loads, in the dtypes that the leaves have; it appears at once or not at all.

    Raises UsageError, before anything is written, if the folder exists or no architecture is this graph; RunError if it
    cannot be written.
    """
    folder = epath.Path(path).expanduser()
    if folder.exists():
        raise UsageError(f'{path} exists: name a new folder')
    family, config = _family_for(opened)
    plan = _plan(opened, family)
    words, ids = _words_of(opened, say)
    ends = ids['eos_token_id'] if isinstance(ids['eos_token_id'], list) else [ids['eos_token_id']]
    if opened.scored and ids['pad_token_id'] is not None and ids['pad_token_id'] in ends:
        ids['pad_token_id'] = None  # transformers reads the score before the last padding: it would pass by the end
        say('the tokenizer has no padding of its own, so give transformers one row at a time, or set a pad_token')
    biggest = max(plan, key=lambda tensor: tensor.nbytes)
    config |= ids | {'torch_dtype': DTYPES[biggest.kind].name} | (_of_scores(opened, say) if opened.scored else {})
    with files.new_folder(folder) as made:
        for name, content in words.items():
            files.write_bytes(made / name, content)
        files.write_json(made / CONFIG, config)
        _write_weights(opened, made, plan, say)


def _family_for(opened: Opened) -> tuple[Family, dict[str, Any]]:
    """The first architecture that is this graph, and beside which transformers reads its tokenizer as it is; and its
    config.json."""
    from lm.interop.tokenizers import conversion as tokenizers

    family, config = family_config.choose(opened.model, scored=opened.scored)
    kind = family.model_type
    if not opened.tokenizer or not tokenizers.replaced_in(kind, opened.tokenizer):
        return family, config
    try:
        return family_config.choose(opened.model, scored=opened.scored, without=kind)
    except UsageError as error:
        raise UsageError(
            f'{opened.where}: transformers splits the texts of {kind} in a way of its own, so this tokenizer would '
            f'have other ids there; and else {error}: write a GGUF file'
        ) from None


def _plan(opened: Opened, family: Family) -> list[Tensor]:
    """The tensors in their order."""
    model = {**opened.model, 'tied': opened.model['tied'] or opened.scored}

    def kind_of(leaf: str, *_: Any) -> tuple[str, int, int]:
        dtype = opened.leaf(leaf).dtype
        return file.kind_of(dtype), 1, dtype.itemsize

    plan, dim = graph.plan(_names(family, model, scored=opened.scored), model, kind_of), opened.model['dim']
    return plan + [Tensor(name, 'F32', (dim,), 4 * dim, '', 0) for name in _zeros(family, opened.model)]


def _zeros(family: Family, model: Mapping[str, Any]) -> list[str]:
    """The names of tensors that a family has beside our parameters, all of them zero."""
    return [families.ZERO.format(layer=i) for i in range(model['layers'] if family.biased else 0)]


def _words_of(opened: Opened, say: Callable[[str], None]) -> tuple[dict[str, bytes], dict[str, Any]]:
    """(the tokenizer's files, the ids of its symbols as config.json and generation_config.json name them)."""
    from lm.interop.tokenizers import conversion as tokenizers

    if not opened.tokenizer:
        say(f'{opened.where} has no tokenizer, and so the folder has none')
        return {}, dict.fromkeys(tokenizer_files.IDS)  # null: a family's own ids may be beyond a small vocabulary
    words = tokenizers.to_huggingface(opened.tokenizer, context=opened.model.get('context'))
    return tokenizer_files.exported(words, rows=opened.model['vocab_size'])


def _of_scores(opened: Opened, say: Callable[[str], None]) -> dict[str, Any]:
    """The keys of config.json that a reward model has beside the graph's."""
    bias = float(opened.leaves['bias_score'].read(0))
    say(f'the score has a bias of {bias:.6g}, which transformers does not add: it stands in {CONFIG} as {BIAS}')
    if 'head_DV' in opened.leaves:
        say('the head of the language model, which no score is made of, is left out')
    scale = dict(zip((MEAN, STD), opened.scale, strict=True)) if opened.scale else {}
    return {'num_labels': 1, 'id2label': {'0': 'score'}, 'label2id': {'score': 0}, BIAS: bias} | scale


def _shards(plan: Sequence[Tensor]) -> list[list[Tensor]]:
    """The tensors in files of at most SHARD; a larger tensor has one of its own."""
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in plan:
        if shards[-1] and size + tensor.nbytes > SHARD:
            shards, size = [*shards, []], 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def _write_weights(opened: Opened, folder: epath.Path, plan: Sequence[Tensor], say: Callable[[str], None]) -> None:
    shards = _shards(plan)
    one = len(shards) == 1
    names = [WEIGHTS if one else f'model-{i:05d}-of-{len(shards):05d}.safetensors' for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        say(f'{name}: {len(shard)} tensors, {sum(t.nbytes for t in shard):,} bytes')
        with files.streamed(folder / name) as write:
            write(file.header({t.name: (t.kind, t.shape) for t in shard}))
            for tensor in progress.over(shard, 'tensors'):
                for piece in _pieces(opened, tensor):
                    write(piece)
    if not one:
        places = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(tensor.nbytes for tensor in plan)
        files.write_json(folder / INDEX, {'metadata': {'total_size': total}, 'weight_map': places})


def _pieces(opened: Opened, tensor: Tensor) -> Iterator[bytes]:
    """The bytes of a tensor, a few rows at a time."""
    if tensor.leaf:
        stored = graph.to_stored(opened.leaves[tensor.leaf].read(tensor.layer), tensor.leaf, tensor.shape)
    else:
        stored = np.zeros(tensor.shape)
    for rows in graph.in_pieces(stored):
        yield rows.astype(DTYPES[tensor.kind], copy=False).tobytes()
