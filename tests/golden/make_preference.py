"""Makes preference.json and preference.npz: what `trl` and `transformers` say of tiny models, as numbers.

    pip install torch transformers trl datasets
    python tests/golden/make_preference.py

Every value comes from the trainer that TRL's users run, on the batch that its own collator makes. Run it again only to
take a newer TRL; the versions stand in the file. Where TRL's convention is not the paper's or not ours:

    cdpo    `DPOTrainer` has no conservative loss any more. `CPOTrainer.cpo_loss` has the same formula without a
            reference, so it is given log-ratios where it expects log-probs.
    orpo    TRL's NLL is over prompt and response, the paper's over the response: both parts are stored, and the NLL of
            the response alone from `CPOTrainer`, whose labels leave the prompt out.
    simpo   `CPOTrainer` adds the NLL by default (cpo_alpha=1); the paper does not: stored with 0.
    kto     the mean is over examples; each pair is two, so it is the mean over pairs of the mean of two.
    ipo     per token, as ours.
"""

import json
import platform
import re
import tempfile
from pathlib import Path

import datasets
import numpy as np
import tokenizers
import torch
import transformers
import trl
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

HERE = Path(__file__).parent
WORDS, PAD, EOS = 59, 59, 60
SHAPE = {
    'vocab_size': 61, 'hidden_size': 16, 'num_hidden_layers': 2, 'num_attention_heads': 4, 'num_key_value_heads': 2,
    'intermediate_size': 32, 'head_dim': 4, 'rms_norm_eps': 1e-5, 'max_position_embeddings': 64,
    'initializer_range': 0.3, 'pad_token_id': PAD, 'eos_token_id': EOS, 'bos_token_id': None,
    'rope_parameters': {'rope_type': 'default', 'rope_theta': 5000.0}, 'attn_implementation': 'eager',
}  # fmt: skip
BETA, SMOOTHING, GAMMA, LAMBDA, CENTRING = 0.3, 0.1, 0.7, (1.0, 1.5), 0.01
MATRICES = {
    'self_attn.q_proj': 'wq_DNH', 'self_attn.k_proj': 'wk_DKH', 'self_attn.v_proj': 'wv_DKH',
    'self_attn.o_proj': 'wo_NHD', 'mlp.gate_proj': 'w_gate_DF', 'mlp.up_proj': 'w_up_DF', 'mlp.down_proj': 'w_down_FD',
}  # fmt: skip


def make_model(seed, *, tied):
    """A random Llama whose norms are not 1."""
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, tie_word_embeddings=tied))
    for name, x in model.named_parameters():
        if 'norm' in name:
            x.data += 0.2 * torch.randn_like(x)
    return model


def make_reward_model(body, seed):
    """The body with a scalar head."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**SHAPE, num_labels=1)
    model = transformers.LlamaForSequenceClassification(config)
    model.model.load_state_dict(body.model.state_dict())
    return model


def weights_of(model):
    """The weights under this project's names, layers stacked."""
    state = {name: x.detach().numpy() for name, x in model.state_dict().items()}
    layers = SHAPE['num_hidden_layers']
    stacked = lambda name: np.stack([state[f'model.layers.{i}.{name}.weight'] for i in range(layers)])
    heads = {'N': SHAPE['num_attention_heads'], 'K': SHAPE['num_key_value_heads'], 'H': SHAPE['head_dim']}
    sizes = heads | {'D': SHAPE['hidden_size'], 'F': SHAPE['intermediate_size']}
    out = {'embed_VD': state['model.embed_tokens.weight'], 'final_norm_D': state['model.norm.weight']}
    if 'lm_head.weight' in state and not model.config.tie_word_embeddings:
        out['head_DV'] = state['lm_head.weight'].T
    for theirs, ours in MATRICES.items():
        shape = [sizes[d] for d in ours.rpartition('_')[2]]
        out[f'layers/{ours}'] = np.swapaxes(stacked(theirs), 1, 2).reshape(layers, *shape)
    out['layers/attn_norm_D'] = stacked('input_layernorm')
    out['layers/mlp_norm_D'] = stacked('post_attention_layernorm')
    return out


def make_tokenizer():
    vocab = {f'w{i}': i for i in range(WORDS)} | {'<pad>': PAD, '<eos>': EOS}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token='w0'))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=plain, pad_token='<pad>', eos_token='<eos>')


def make_pairs(rng):
    """Texts of ragged lengths; what stands between prompt and response is a space."""
    words = lambda low, high: ' '.join(f'w{i}' for i in rng.integers(0, WORDS, rng.integers(low, high)))
    row = lambda: {
        'prompt': words(2, 7), 'chosen': f' {words(1, 8)} <eos>', 'rejected': f' {words(1, 8)} <eos>',
    }  # fmt: skip
    return [row() for _ in range(5)]


def make_chats(rng):
    """Ids with a mask of what the assistant said: two turns, one, none of the last tokens, all but the first."""
    spans = [[(3, 6), (9, 13)], [(2, 11)], [(4, 5)], [(1, 8)]]
    lengths = [13, 12, 7, 8]
    return [
        {
            'input_ids': rng.integers(0, WORDS, n).tolist(),
            'assistant_masks': [int(any(a <= i < b for a, b in span)) for i in range(n)],
        }
        for n, span in zip(lengths, spans, strict=True)
    ]


def options(folder, rows, **more):
    return {
        'output_dir': folder, 'use_cpu': True, 'bf16': False, 'gradient_checkpointing': False, 'report_to': 'none',
        'per_device_train_batch_size': rows, 'disable_tqdm': True, 'remove_unused_columns': False, **more,
    }  # fmt: skip


def batch_of(trainer):
    """The whole dataset as one batch, as the trainer's collator makes it."""
    keep = lambda row: {k: v for k, v in row.items() if v is not None}
    return trainer.data_collator([keep(row) for row in trainer.train_dataset])


def measured(trainer, loss_fn):
    """{loss, grad_norm}."""
    model = trainer.model
    model.zero_grad()
    loss = loss_fn(model)
    loss.backward()
    norm = torch.sqrt(sum(torch.sum(x.grad.double() ** 2) for x in model.parameters() if x.grad is not None))
    return {'loss': loss.item(), 'grad_norm': norm.item()}


def numbers(batch):
    return {name: x.tolist() for name, x in batch.items() if isinstance(x, torch.Tensor)}


def sft(models, tokenizer, folder):
    args = trl.SFTConfig(**options(folder, 4), max_length=None)
    dataset = datasets.Dataset.from_list(make_chats(np.random.default_rng(2)))
    trainer = trl.SFTTrainer(models['policy'](), args=args, train_dataset=dataset, processing_class=tokenizer)
    batch = batch_of(trainer)
    out = measured(trainer, lambda model: trainer.compute_loss(model, dict(batch)))
    plain = models['policy']()(**batch).loss  # the same by transformers alone
    return {'batch': numbers(batch), 'trl': out, 'transformers': plain.item()}


def dpo(models, tokenizer, folder, pairs):
    """The losses that `DPOTrainer` has, and the log-probs that they are made of."""
    args = trl.DPOConfig(**options(folder, len(pairs)), beta=BETA, label_smoothing=SMOOTHING)
    dataset = datasets.Dataset.from_list(pairs)
    trainer = trl.DPOTrainer(
        models['policy'](), models['reference'](), args=args, train_dataset=dataset, processing_class=tokenizer
    )
    batch, out = batch_of(trainer), {}
    for ours, theirs in {'dpo': 'sigmoid', 'ipo': 'ipo', 'robust': 'robust'}.items():
        trainer.loss_types = [theirs]
        out[ours] = measured(trainer, lambda model: trainer.compute_loss(model, dict(batch)))
    ids, mask = batch['input_ids'], batch['completion_mask']
    labels = ids.masked_fill(mask == 0, -100)
    with torch.no_grad():
        logp = {
            name: model(ids, attention_mask=batch['attention_mask'], labels=labels, fused_lm_head=True).log_probs.sum(1)
            for name, model in {'policy': trainer.model, 'reference': trainer.ref_model}.items()
        }
    return batch, {name: x.tolist() for name, x in logp.items()}, out


def cpo(models, tokenizer, folder, pairs, logp):
    """SimPO, the NLL of the chosen responses, and cDPO by the formula of CPO."""
    args = CPOConfig(**options(folder, len(pairs)), beta=BETA, loss_type='simpo', simpo_gamma=GAMMA, cpo_alpha=0.0)
    dataset = datasets.Dataset.from_list(pairs)
    trainer = CPOTrainer(models['policy'](), args=args, train_dataset=dataset, processing_class=tokenizer)
    batch = batch_of(trainer)
    simpo = measured(trainer, lambda model: trainer.get_batch_loss_metrics(model, batch)[0])
    trainer.cpo_alpha = 1.0
    nll = trainer.get_batch_loss_metrics(trainer.model, batch)[1]['nll_loss']
    trainer.loss_type, trainer.label_smoothing = 'sigmoid', SMOOTHING
    ratio = torch.tensor(logp['policy']) - torch.tensor(logp['reference'])
    cdpo = trainer.cpo_loss(*ratio.chunk(2))[0].mean().item()
    return {'simpo': simpo, 'cdpo': {'loss': cdpo}, 'nll': {'loss': nll}}


def orpo(models, tokenizer, folder, pairs):
    args = ORPOConfig(**options(folder, len(pairs)), beta=BETA)
    dataset = datasets.Dataset.from_list(pairs)
    trainer = ORPOTrainer(models['policy'](), args=args, train_dataset=dataset, processing_class=tokenizer)
    batch = batch_of(trainer)
    out = measured(trainer, lambda model: trainer.get_batch_loss_metrics(model, batch)[0])
    metrics = trainer.get_batch_loss_metrics(trainer.model, batch)[1]
    return out | {'nll': metrics['nll_loss'], 'odds': -BETA * metrics['log_odds_ratio']}


def kto(models, tokenizer, folder, pairs):
    """Once each way round, since only one of two models has a positive z0 under the other."""
    out = {}
    for name, (policy, reference) in {'kto': ('policy', 'reference'), 'kto_turned': ('reference', 'policy')}.items():
        weights = {'desirable_weight': LAMBDA[0], 'undesirable_weight': LAMBDA[1]}
        args = trl.KTOConfig(**options(folder, 2 * len(pairs)), beta=BETA, **weights)
        dataset = datasets.Dataset.from_list(pairs)
        trainer = trl.KTOTrainer(
            models[policy](), models[reference](), args=args, train_dataset=dataset, processing_class=tokenizer
        )
        batch = batch_of(trainer)
        out[name] = measured(trainer, lambda model: trainer.compute_loss(model, dict(batch)))  # noqa: B023
        out[name]['z0'] = trainer._metrics['train']['kl'][-1]
    return numbers(batch), out


def reward(models, tokenizer, folder, pairs):
    margins = [0.0, 0.5, 1.0, 0.25, 0.0]
    rows = [pair | {'margin': m} for pair, m in zip(pairs, margins, strict=True)]
    args = trl.RewardConfig(**options(folder, len(pairs)), center_rewards_coefficient=CENTRING)
    model = models['reward']()
    trainer = trl.RewardTrainer(
        model, args=args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
    )
    batch = batch_of(trainer)
    out = measured(trainer, lambda model: trainer.compute_loss(model, dict(batch)))
    with torch.no_grad():
        scores = model(batch['input_ids'], attention_mask=batch['attention_mask']).logits[:, 0]
    accuracy = trainer._metrics['train']['accuracy'][-1]
    return {'batch': numbers(batch), 'scores': scores.tolist(), 'accuracy': accuracy, 'trl': out}


def main():
    torch.set_num_threads(1)
    models = {
        'policy': lambda: make_model(0, tied=False),
        'reference': lambda: make_model(1, tied=True),
        'reward': lambda: make_reward_model(make_model(0, tied=False), 2),
    }
    tokenizer, pairs = make_tokenizer(), make_pairs(np.random.default_rng(1))
    with tempfile.TemporaryDirectory() as folder:
        batch, logp, losses = dpo(models, tokenizer, folder, pairs)
        losses |= cpo(models, tokenizer, folder, pairs, logp)
        losses['orpo'] = orpo(models, tokenizer, folder, pairs)
        examples, found = kto(models, tokenizer, folder, pairs)
        golden = {
            'versions': {m.__name__: m.__version__ for m in (trl, transformers, torch)}
            | {'python': platform.python_version()},
            'model': {k: v for k, v in SHAPE.items() if k != 'attn_implementation'},
            'settings': {
                'beta': BETA, 'label_smoothing': SMOOTHING, 'margin': GAMMA, 'lambda_d': LAMBDA[0],
                'lambda_u': LAMBDA[1], 'centring': CENTRING,
            },
            'sft': sft(models, tokenizer, folder),
            'pairs': {'batch': numbers(batch), 'logp': logp},
            'examples': {'batch': examples},
            'losses': losses | found,
            'reward': reward(models, tokenizer, folder, pairs),
        }  # fmt: skip
    text = json.dumps(golden, indent=1) + '\n'
    (HERE / 'preference.json').write_text(re.sub(r'\[[^{}\[\]]*\]', lambda row: ' '.join(row[0].split()), text))
    arrays = {f'{name}/{k}': v for name in ('policy', 'reference') for k, v in weights_of(models[name]()).items()}
    arrays['score_D'] = models['reward']().score.weight.detach().numpy()[0]
    np.savez_compressed(HERE / 'preference.npz', **arrays)


if __name__ == '__main__':
    main()
