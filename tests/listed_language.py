"A language so small that every completion is listed: three tokens, the first ends it, at most three tokens long."
import torch
from torch import Tensor


def all_completions(prefix: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
    if len(prefix) == 3 or 0 in prefix:
        return [prefix]
    return [completion for token in range(3) for completion in all_completions((*prefix, token))]


COMPLETIONS = all_completions()  # 15
STATES = sorted({completion[:t] for completion in COMPLETIONS for t in range(len(completion))})  # 7 prefixes


def padded(rows, filler) -> Tensor:
    return torch.tensor([[*row, *[filler] * (3 - len(row))] for row in rows])


TOKENS = padded(COMPLETIONS, 0)  # [15, 3]
LIVE = padded([[True] * len(c) for c in COMPLETIONS], False)  # [15, 3]
STATE = padded([[STATES.index(c[:t]) for t in range(len(c))] for c in COMPLETIONS], 0)  # [15, 3]


def random_table(seed: int) -> Tensor:
    "Logits [7, 3] of a random policy, float64 with gradient."
    return torch.randn(7, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def random_rewards(seed: int) -> Tensor:
    "0/1 rewards [15], at least one of each, float64."
    rewards = torch.rand(15, generator=torch.Generator().manual_seed(seed)).lt(0.4).double()
    rewards[0], rewards[-1] = 0., 1.
    return rewards


def token_log_probs(table: Tensor) -> Tensor:
    "[15, 3], NaN where a completion has already ended."
    return torch.where(LIVE, table.log_softmax(-1)[STATE, TOKENS], torch.nan)


def probabilities(table: Tensor) -> Tensor:
    "[15], differentiable, summing to one."
    return torch.where(LIVE, table.log_softmax(-1)[STATE, TOKENS], 0.).sum(-1).exp()


def visits(table: Tensor) -> Tensor:
    "Expected number of visits of each state, [7]."
    counts = torch.zeros(7, dtype=torch.float64)
    return counts.index_put((STATE[LIVE],), (probabilities(table)[:, None] * LIVE)[LIVE], accumulate=True)


def gradient(scalar: Tensor, *tables: Tensor):
    gradients = torch.autograd.grad(scalar, tables, retain_graph=True)
    return gradients[0] if len(tables) == 1 else gradients
