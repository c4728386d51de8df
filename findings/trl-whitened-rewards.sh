#!/usr/bin/env bash
# trl 0.24.0: PPO's `whiten_rewards=True` pays for short responses.
#
# The function that its PPOTrainer whitens rewards with (`trl.core.masked_whiten`, shift_mean=False) is the published
# (x − mean)/std + mean. Given: four responses of 2 to 16 tokens with the same score, 1 at their last token, no KL.
# Expected: the same return, as nothing but the length differs. Seen: the return falls with each token, because the mean
# is taken off in units of the deviation and given back in units of the score; the longest has a negative return. With
# scores below 0 it is the other way round, and long responses are paid for.
# In the published experiments all responses had 24 tokens, and there it moves all of them alike. Dividing by the
# deviation alone keeps the order of returns.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT; cd "$work"
python3 -m venv env
env/bin/pip install -q 'trl==0.24.0' 'torch==2.14.1' 'transformers==4.57.1' 'accelerate==1.11.0'
cat > try.py <<'P'
import torch, trl
from trl.core import masked_whiten
lengths = torch.tensor([2, 4, 8, 16])
place = torch.arange(16)[None]
mask = place < lengths[:, None]
for score in (1.0, -1.0):
    rewards = score * (place == lengths[:, None] - 1).float()
    returns = (masked_whiten(rewards, mask, shift_mean=False) * mask).sum(1)
    scaled = (rewards / rewards[mask].std()).sum(1)
    print('trl', trl.__version__, 'score', score, 'tokens', lengths.tolist(), 'whitened', [round(x, 2) for x in returns.tolist()],
          'divided', [round(x, 2) for x in scaled.tolist()])
    falls = bool((returns.diff() * score < 0).all())
    print('the return falls with the length' if falls and score > 0 else 'the return rises with the length' if falls else 'changed')
P
env/bin/python try.py 2>/dev/null | tee seen
grep -q '^the return falls with the length$' seen
grep -q '^the return rises with the length$' seen
echo 'as stated: the length changes what one score is worth'
