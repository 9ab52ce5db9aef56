"""Small trainings that any number of processes may share, and what they leave: weights after the first step and at the end, histories.

Run as `python process_cases.py PROCESSES FOLDER`, Lightning starts the other processes by running this file again; imported,
one process does the same work. Expert Iteration comes first because a real one, too, samples before there is a second process."""
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch

from echochamber.models.decoder import Decoder, DecoderConfig
from echochamber.models.generation import SamplingConfig
from echochamber.training.algorithms import OnPolicyConfig, grpo_config, ppo_config, reinforce_config
from echochamber.training.critic import CriticConfig
from echochamber.training.distributed import global_rank
from echochamber.training.expert_iteration import ExpertIterationConfig, train_expert_iteration
from echochamber.training.fitting import FitConfig, OptimiserConfig, SnapshotCallback
from echochamber.training.policy import train_policy
from echochamber.training.pretraining import pretrain
from echochamber.training.rollouts import VerifierConfig
from echochamber.training.supervised import Example, SupervisedConfig, train_supervised
from echochamber.training.toy import toy_task

torch.set_num_threads(1)
Case = Callable[[int, Path], tuple[Decoder, pd.DataFrame]]  # processes, folder → trained model, history


def save(model: Decoder, folder: Path, moment: str) -> None:
    torch.save({name: tensor.clone() for name, tensor in model.state_dict().items()}, folder / f"weights-{moment}.pt")


def keep_first(model: Decoder, folder: Path) -> SnapshotCallback:
    return SnapshotCallback([1], lambda step: save(model, folder, "first"))


def fail_at_four(step: int, steps: int, message: str) -> None:
    "A report that fails in every process after the fourth optimiser step."
    if step == 4:
        raise InterruptedError


def policy_case(make_config, interrupted: bool = False, loss: dict | None = None, **options) -> Case:
    "Eight steps, resume points at 3 and 6, inside a rollout batch."
    def train(processes: int, folder: Path) -> tuple[Decoder, pd.DataFrame]:
        policy, tokenizer, questions, grader = toy_task()
        config = make_config(8, prompts=10, samples=8, train_batch=40, micro_batch=10, max_new_tokens=4, temperature=1.0,
                             learning_rate=3e-4, precision="32-true", checkpoint_every=3, processes=processes, **options)
        config = OnPolicyConfig(**config.model_dump() | {"loss": config.loss.model_dump() | (loss or {})})
        arguments = policy, tokenizer, questions, grader, config, folder, [keep_first(policy, folder)]
        if interrupted:
            try:
                train_policy(*arguments, report=fail_at_four)
            except InterruptedError:
                policy.load_state_dict(toy_task()[0].state_dict())
        return policy, train_policy(*arguments)
    return train


def imitation(processes: int) -> SupervisedConfig:
    return SupervisedConfig(epochs=4, batch=8, micro_batch=2, learning_rate=3e-4, precision="32-true", checkpoint_every=1,
                            processes=processes)


def supervised_case(processes: int, folder: Path) -> tuple[Decoder, pd.DataFrame]:
    "Each digit as many times as it says, in rows of every length."
    policy = toy_task()[0]
    examples = [Example([digit + 1], [digit + 1] * digit + [0]) for digit in range(10)]
    return policy, train_supervised(policy, examples, imitation(processes), folder, [keep_first(policy, folder)])


def expert_iteration_case(processes: int, folder: Path) -> tuple[Decoder, pd.DataFrame]:
    "Two rounds; one process samples the first, before the others are there, and all of them the second, in shares."
    policy, tokenizer, questions, grader = toy_task()
    config = ExpertIterationConfig(rounds=2, samples=32, sampling=SamplingConfig(max_new_tokens=3), prompts=3,
                                   supervised=imitation(processes))
    return policy, train_expert_iteration(policy, tokenizer, questions, grader, config, folder, keep_first(policy, folder))


class Rows:
    "Micro-batches of four random rows, of which every process gets its share."

    def __init__(self, processes: int):
        self.processes = processes

    def __len__(self) -> int:
        return 10

    def __iter__(self):
        for rows in torch.randint(11, (10, 4, 9), generator=torch.Generator().manual_seed(0)):
            yield rows.chunk(self.processes)[global_rank()]


def pretraining_case(processes: int, folder: Path) -> tuple[Decoder, pd.DataFrame]:
    "Five steps of two micro-batches."
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(width=16, layers=2, heads=2, vocab_size=11, context=16))
    config = FitConfig(optimiser=OptimiserConfig(learning_rate=3e-4, horizon=5), steps=5, accumulate=2, precision="32-true",
                       processes=processes, checkpoint_every=1)
    return model, pretrain(model, Rows(processes), config, folder, [keep_first(model, folder)])


PPO = {"kl_coefficient": 0.1, "critic": CriticConfig(learning_rate=1e-3), "passes": 2}
CASES: dict[str, Case] = {
    "expert_iteration": expert_iteration_case,
    "grpo": policy_case(grpo_config, kl_coefficient=0.1, loss={"truncated": "mask", "normaliser": "token"}),
    "ppo": policy_case(ppo_config, **PPO),
    "verifier": policy_case(grpo_config, verifier=VerifierConfig(true_positive_rate=0.8, false_positive_rate=0.3)),
    "reinforce": policy_case(reinforce_config, loss={"truncated": "mask", "normaliser": "sequence"}),
    "interrupted": policy_case(ppo_config, interrupted=True, **PPO),
    "supervised": supervised_case,
    "pretraining": pretraining_case,
}


def train_all(processes: int, folder: Path) -> None:
    for name, train in CASES.items():
        (folder / name).mkdir(parents=True, exist_ok=True)  # the second process comes later
        model, history = train(processes, folder / name)
        save(model, folder / name, f"last-{global_rank()}")
        if global_rank() == 0:
            history.to_parquet(folder / name / "history.parquet")


if __name__ == "__main__":
    train_all(int(sys.argv[1]), Path(sys.argv[2]))
