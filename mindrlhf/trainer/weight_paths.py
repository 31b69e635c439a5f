"""Which weights each model of a PPO job starts from, checked before anything is built; needs no MindSpore."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from mindrlhf.checkpoint.shards import check_weights, find_weights
from mindrlhf.configs.flags import PPOOptions
from mindrlhf.configs.keys import JobConfig
from mindrlhf.utils.errors import MindRLHFError
from mindrlhf.utils.result_files import MODELS


@dataclass(frozen=True)
class WeightPaths:
    """Where the weights of each model come from, as given on the command line.

    Each is a full ``.ckpt`` / ``.safetensors`` file, a Hugging Face directory, a directory with
    ``rank_0/ rank_1/ ...``, a checkpoint, or the results of a run.
    """

    infer: Path | None = None
    train: Path | None = None
    ref: Path | None = None
    reward: Path | None = None
    critic: Path | None = None

    @classmethod
    def of(cls, options: PPOOptions) -> WeightPaths:
        """As the flags give them."""
        return cls(
            infer=options.load_sft_checkpoint_infer,
            train=options.load_sft_checkpoint_train,
            ref=options.load_ref_checkpoint,
            reward=options.load_rm_checkpoint,
            critic=options.load_critic_checkpoint,
        )

    def checked(self) -> WeightPaths:
        """The weights that the paths stand for, with defaults; refuses paths that do not exist.

        The policy's two models stand in for each other, and the policy for the reference. A critic
        starts from the reward model (InstructGPT, arXiv 2203.02155). Reward model and critic stay ``None``
        when neither is given: they then start from the policy with a fresh head.

        Raises:
            MindRLHFError: no policy weights at all, or a path does not exist; or as :func:`find_weights`.
        """
        missing = [
            f"{field.name}: {path}"
            for field in fields(self)
            if (path := getattr(self, field.name)) and not path.exists()
        ]
        if missing:
            raise MindRLHFError(
                "these checkpoints do not exist, give existing paths:\n  " + "\n  ".join(missing)
            )
        paths = {
            role: path and find_weights(path, role if role in MODELS else "policy")
            for role, path in vars(self).items()
        }
        policy = paths["train"] or paths["infer"]
        if policy is None:
            raise MindRLHFError(
                "no policy weights: pass --load_sft_checkpoint_train and/or --load_sft_checkpoint_infer"
            )
        infer, reward = paths["infer"] or policy, paths["reward"]
        return WeightPaths(infer, policy, paths["ref"] or infer, reward, paths["critic"] or reward)

    def check_against(self, job: JobConfig, *, with_reward_model: bool) -> None:
        """Refuses weights that do not fit the models of a job, before any of them is built.

        Raises:
            MindRLHFError: as :meth:`checked` and :func:`mindrlhf.checkpoint.shards.check_weights`.
        """
        paths = self.checked()
        wanted = [(path, job.infer, False) for path in (paths.infer, paths.ref)]
        wanted.append((paths.train, job.train, False))
        if with_reward_model:
            wanted.append((paths.reward or paths.train, job.reward, True))
        if job.ppo.critic == "separate":
            wanted.append((paths.critic or paths.train, job.critic, True))
        for path, config, score_head in wanted:
            assert path is not None
            check_weights(path, config, score_head=score_head)
