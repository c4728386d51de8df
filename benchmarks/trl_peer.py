"""TRL as a peer: its trainers' steps on a CPU, at several settings (`pip install -e '.[peers]'`)."""

import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from peers import torch_llama
from posttraining import Sequence_, Side

from lm.model.transformer import ModelConfig

os.environ.setdefault('TQDM_DISABLE', '1')
IGNORED = -100
SFT_SIZES, PACKED_SIZES = (8, 16, 32), (1, 2, 4, 8)  # conversations, and packed rows, in memory at once
DPO_SIZES = (4, 8, 16, 32)  # pairs
ORDERS = {'default order': 'random', 'grouped by length': 'group_by_length'}


def sft(found: Sequence[Sequence_], params: Any, cfg: ModelConfig, *, steps: int, longest: int) -> list[Side]:
    """SFTTrainer with padding and grouping by length, and with packing."""
    from trl import SFTConfig, SFTTrainer

    label = lambda ids, trained: [i if t else IGNORED for i, t in zip(ids, trained, strict=True)]
    rows = [{'input_ids': ids, 'labels': label(ids, trained)} for ids, trained in found]

    def side(name: str, size: int, **options: Any) -> Side:
        config = SFTConfig(**_arguments(size), max_length=longest, **options)
        trainer = SFTTrainer(_model(params, cfg, longest), config, **_data(rows, cfg))
        return _side(f'{name}, {size} at once', trainer, steps)

    padded = [side('padded, grouped by length', n, train_sampling_strategy='group_by_length') for n in SFT_SIZES]
    return padded + [side('packed', n, packing=True) for n in PACKED_SIZES]


def dpo(
    found: Sequence[tuple[Sequence_, ...]], params: Any, cfg: ModelConfig, *, steps: int, longest: int
) -> list[Side]:
    """DPOTrainer with the reference's log-probs precomputed."""
    from trl import DPOConfig, DPOTrainer

    class Tokenized(DPOTrainer):
        """One whose data are ids already: it knows no other way to be given them."""

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    rows = [_pair(*pair) for pair in found]

    def side(order: str, size: int) -> Side:
        config = DPOConfig(
            **_arguments(size), max_length=longest, precompute_ref_log_probs=True, remove_unused_columns=False,
            train_sampling_strategy=ORDERS[order],
        )  # fmt: skip
        trainer = Tokenized(_model(params, cfg, longest), args=config, **_data(rows, cfg))
        return _side(f'{order}, {size} pairs at once', trainer, steps)

    return [side(order, n) for order in ORDERS for n in DPO_SIZES]


def _pair(chosen: Sequence_, rejected: Sequence_) -> Mapping[str, Any]:
    prompt = chosen[1].index(True)
    responses = {'chosen_ids': chosen[0][prompt:], 'rejected_ids': rejected[0][prompt:]}
    return {'prompt_ids': chosen[0][:prompt], **responses, 'length': max(len(chosen[0]), len(rejected[0]))}


def _arguments(size: int) -> dict[str, Any]:
    """The settings that all trainers share."""
    return {
        'output_dir': tempfile.gettempdir(), 'per_device_train_batch_size': size, 'use_cpu': True, 'bf16': False,
        'gradient_checkpointing': False, 'optim': 'adamw_torch_fused', 'weight_decay': 0.1, 'max_grad_norm': 1.0,
        'learning_rate': 1e-4, 'report_to': 'none', 'save_strategy': 'no', 'disable_tqdm': True,
    }  # fmt: skip


def _model(params: Any, cfg: ModelConfig, longest: int) -> Any:
    return torch_llama(params, cfg, length=longest, attention='sdpa')


def _data(rows: list[Any], cfg: ModelConfig) -> dict[str, Any]:
    """The examples, and the tokenizer that a trainer asks for and has no use for: a word for each id."""
    import datasets
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    datasets.disable_progress_bars()
    logging.getLogger('transformers').setLevel(logging.ERROR)
    words = Tokenizer(models.WordLevel({str(i): i for i in range(cfg.vocab_size)}, unk_token='0'))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token='0', eos_token='0')
    return {'train_dataset': datasets.Dataset.from_list(rows), 'processing_class': tokenizer}


def _side(name: str, trainer: Any, steps: int) -> Side:
    """A round of the trainer: its batches, in `steps` updates, each of as many batches as another."""
    import torch

    batches = list(trainer.get_train_dataloader())
    groups = [batches[i[0] : i[-1] + 1] for i in np.array_split(np.arange(len(batches)), min(steps, len(batches)))]
    trainer.create_optimizer()
    model, optimizer = trainer.model, trainer.optimizer

    def update(group: list[Any]) -> float:
        trainer.current_gradient_accumulation_steps = len(group)
        learned = sum((b['labels'][:, 1:] != IGNORED).sum() for b in group) if 'labels' in group[0] else None
        losses = [trainer.training_step(model, dict(batch), learned) for batch in group]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(sum(losses))

    def train() -> float:
        return float(np.mean([update(group) for group in groups]))

    return Side(name, train, sum(b['input_ids'].numel() for b in batches))
