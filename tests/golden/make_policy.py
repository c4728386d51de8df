"""Makes policy.json: what `trl`'s GRPO and RLOO trainers say of a tiny model's responses, as numbers.

    pip install torch transformers trl datasets
    python tests/golden/make_policy.py

The responses, their masks, advantages and log-probs are those that the trainers draw and compute by themselves; the
losses are those of `compute_loss`, with gradients with respect to the log-probs of the tokens. For them the
log-probs of when the batch was drawn, and those of the reference, are moved a little away from those of now, so that
clips bite and no token's k3 outweighs all others. Where TRL's convention is not ours:

    dapo, cispo   the divisor is the tokens of the whole generation batch over the steps that it is cut into, so that a
                  step is not divided by its own tokens: `halves` are two such steps. Ours are the tokens of the step.
    grpo          a response that is masked because it was cut still counts in the divisor: `masked` has one. Ours
                  divides by the responses that count. (dr_grpo's divisor is a constant there and here.)
    k3            times the importance ratio that the surrogate has, so with importance_sampling_level='sequence' times
                  the response's (`gspo_k3`); ours is times the token's.
    cispo         epsilon_high is the bound of the ratio itself and no distance from 1; ours is the same.
    delta         ('two-sided clipping') a bound on the ratio where the advantage is below 0: we have none.
    rloo          its loss has one ratio a response, the product over its tokens, which we have not: the advantages are
                  compared, with k1 taken from the reward, and the gradient where nothing has moved yet.
"""

import json
import platform
import re
import tempfile

import datasets
import make_preference as tiny
import torch
import transformers
import trl

GROUP, LONGEST, TEMPERATURE, BETA = 3, 7, 0.7, 0.3
PROMPTS = ('w3 w14 w15', 'w9 w2 w6 w5 w35')
REWARDS = [0.5, -1.25, 2.0, 1.0, 1.0, 0.25]
CASES = {
    'grpo': {'loss_type': 'grpo'},
    'bnpo': {'loss_type': 'bnpo'},
    'dapo': {'loss_type': 'dapo'},
    'dr_grpo': {'loss_type': 'dr_grpo'},
    'two_sided': {'loss_type': 'dapo', 'epsilon': 0.1, 'epsilon_high': 0.28},
    'cispo': {'loss_type': 'cispo', 'epsilon_high': 1.2},
    'gspo': {'loss_type': 'grpo', 'importance_sampling_level': 'sequence', 'epsilon': 0.05, 'epsilon_high': 0.06},
    'gspo_tokens': {'loss_type': 'dapo', 'importance_sampling_level': 'sequence', 'epsilon': 0.05},
    'k3': {'loss_type': 'dapo', 'beta': BETA},
    'k3_plain': {'loss_type': 'dapo', 'beta': BETA, 'use_bias_correction_kl': False},
    'gspo_k3': {'loss_type': 'grpo', 'importance_sampling_level': 'sequence', 'beta': BETA},
}


def make_trainer(kind, config, folder, **more):
    """A trainer of the tiny policy, whose reward is a constant of the place in the batch."""
    rows = len(PROMPTS) * GROUP
    args = config(
        **tiny.options(folder, rows), num_generations=GROUP, max_completion_length=LONGEST, temperature=TEMPERATURE,
        seed=3, **more,
    )  # fmt: skip
    dataset = datasets.Dataset.from_list([{'prompt': p} for p in PROMPTS])
    reward = lambda completions, **columns: REWARDS[: len(completions)]
    tokenizer = tiny.make_tokenizer()
    tokenizer.padding_side = 'left'
    model = tiny.make_model(0, tied=False)
    model.config._name_or_path = f'{folder}/reference'  # the reference is read by the name of the policy
    trainer = kind(model, reward_funcs=reward, args=args, train_dataset=dataset, processing_class=tokenizer)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def drawn(trainer):
    """The batch that the trainer makes: prompts, responses, advantages, log-probs."""
    torch.manual_seed(265)  # of which two responses end
    return trainer._generate_and_score_completions([{'prompt': p} for p in PROMPTS for _ in range(GROUP)])


def measured(trainer, batch, logp):
    """{loss, gradient [B, T]} of the trainer's own loss, where the policy gives these log-probs."""
    leaf = logp.detach().clone().requires_grad_()
    trainer._get_per_token_logps_and_entropies = lambda *a, **k: (leaf, torch.zeros_like(leaf), None)
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    return {'loss': loss.item(), 'gradient': leaf.grad.tolist()}


def main():
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        tiny.make_model(1, tied=True).save_pretrained(f'{folder}/reference')
        # ---- one batch, and the log-probs of its responses ----
        trainer = make_trainer(trl.GRPOTrainer, trl.GRPOConfig, folder, beta=BETA)
        batch = drawn(trainer)
        ids = torch.cat([batch['prompt_ids'], batch['completion_ids']], 1)
        real = torch.cat([batch['prompt_mask'], batch['completion_mask']], 1)
        with torch.no_grad():
            logp, entropy, _ = trainer._get_per_token_logps_and_entropies(
                trainer.model, ids, real, LONGEST, compute_entropy=True
            )
        mask = batch['completion_mask']
        lengths = mask.sum(1).tolist()
        assert len(set(lengths)) > 2, f'responses of other lengths are wanted, not {lengths}'
        noise, more = 0.5 * torch.randn((2, *logp.shape), generator=torch.Generator().manual_seed(1)) * mask
        reference = batch['ref_per_token_logps']
        batch |= {'old_per_token_logps': logp - noise, 'ref_per_token_logps': logp - more}

        # ---- the losses ----
        losses = {}
        for name, settings in CASES.items():
            made = make_trainer(trl.GRPOTrainer, trl.GRPOConfig, folder, **settings)
            losses[name] = measured(made, batch, logp)
        halves = make_trainer(trl.GRPOTrainer, trl.GRPOConfig, folder, loss_type='dapo', steps_per_generation=2)
        parts = [
            {k: v[part] if v.dim() else v for k, v in batch.items()} for part in (slice(GROUP), slice(GROUP, None))
        ]
        found = [measured(halves, part, x) for part, x in zip(parts, logp.split(GROUP), strict=True)]
        masked = dict(batch) | {'completion_mask': mask * (torch.arange(len(mask)) > 0).int()[:, None]}
        losses['masked'] = {
            name: measured(make_trainer(trl.GRPOTrainer, trl.GRPOConfig, folder, loss_type=name), masked, logp)
            for name in ('grpo', 'dr_grpo')
        }

        # ---- the advantages ----
        advantages = {}
        for how in ('group', 'batch', 'none'):
            of = make_trainer(trl.GRPOTrainer, trl.GRPOConfig, folder, scale_rewards=how)
            advantages[how] = drawn(of)['advantages'].tolist()
        rloo = make_trainer(trl.RLOOTrainer, trl.RLOOConfig, folder, beta=BETA)
        own = drawn(rloo)
        assert torch.equal(own['completion_ids'], batch['completion_ids']), 'one seed, one batch'
        advantages['rloo'] = own['advantages'].tolist()
        losses['rloo'] = measured(rloo, own, logp)
    golden = {
        'versions': {m.__name__: m.__version__ for m in (trl, transformers, torch)}
        | {'python': platform.python_version()},
        'settings': {'temperature': TEMPERATURE, 'beta': BETA, 'longest': LONGEST, 'group': GROUP, 'cases': CASES},
        'batch': {
            'input_ids': ids.tolist(), 'attention_mask': real.tolist(), 'completion_mask': mask.tolist(),
            'logp': logp.tolist(), 'entropy': entropy.tolist(), 'old': batch['old_per_token_logps'].tolist(),
            'near': batch['ref_per_token_logps'].tolist(), 'reference': reference.tolist(),
            'advantages': batch['advantages'].tolist(),
        },
        'rewards': REWARDS,
        'advantages': advantages,
        'losses': losses,
        'halves': found,
    }  # fmt: skip
    text = json.dumps(golden, indent=1) + '\n'
    (tiny.HERE / 'policy.json').write_text(re.sub(r'\[[^{}\[\]]*\]', lambda row: ' '.join(row[0].split()), text))


if __name__ == '__main__':
    main()
