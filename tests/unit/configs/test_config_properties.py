"""Whatever stands in the YAMLs, loading succeeds or raises ConfigError."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mindrlhf.configs.keys import JobConfig
from mindrlhf.configs.load import load_job, load_ppo_config
from mindrlhf.utils.errors import ConfigError

SOURCE = Path(__file__).resolve().parents[3] / "model_configs" / "qwen_ppo"
NAMES = {
    "infer": "generate_qwen2_tiny.yaml",
    "train": "finetune_qwen2_tiny.yaml",
    "ppo": "ppo_qwen2_tiny.yaml",
}
ROOTS = {role: yaml.safe_load((SOURCE / name).read_text(encoding="utf-8")) for role, name in NAMES.items()}


def _key_paths(section: dict[str, Any], prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for key, value in section.items():
        found.append((*prefix, key))
        if isinstance(value, dict):
            found += _key_paths(value, (*prefix, key))
    return found


PLACES = [(role, path) for role, root in ROOTS.items() for path in _key_paths(root)]

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 20),
    st.integers(),
    st.sampled_from([2**31, 10**400]),
    st.floats(),
    st.dates(),
    st.binary(max_size=3),
    st.text(max_size=5),
    st.sampled_from(["CPU", "Ascend", "AdamW", "linear", "1e-6", "bfloat16", "shared", "None"]),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(scalars, inner, max_size=3),
    max_leaves=6,
)
mutations = st.lists(st.tuples(st.sampled_from(PLACES), st.booleans(), values), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("configs")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    changes=mutations, world_size=st.sampled_from([None, 1, 4]), target=st.sampled_from([None, "CPU", "TPU"])
)
def test_mutated_values_raise_nothing_but_config_errors(
    changes: list[tuple[tuple[str, tuple[str, ...]], bool, Any]],
    world_size: int | None,
    target: str | None,
    directory: Path,
) -> None:
    roots = copy.deepcopy(ROOTS)
    for (role, path), remove, value in changes:
        section: Any = roots[role]
        for key in path[:-1]:
            section = section.get(key) if isinstance(section, dict) else None
        if isinstance(section, dict):
            if remove:
                section.pop(path[-1], None)
            else:
                section[path[-1]] = value
    for role, root in roots.items():
        (directory / f"{role}.yaml").write_text(yaml.safe_dump(root), encoding="utf-8")
    try:
        job = load_job(
            sft_path_infer=directory / "infer.yaml",
            sft_path_train=directory / "train.yaml",
            reward_path=directory / "infer.yaml",
            critic_path=directory / "train.yaml",
            ppo_config=directory / "ppo.yaml",
            world_size=world_size,
            device_target=target,
        )
    except ConfigError as error:
        faults = error.faults
    else:
        faults = ()
        _check_taken(job)
    assert all(": " in fault and " - " in fault for fault in faults)


def _check_taken(job: JobConfig) -> None:
    """What is taken can be computed with."""
    for run in (job.infer, job.train, job.reward, job.critic):
        assert run.model.head_dim % 2 == 0
        assert run.model.num_heads % run.parallel.model_parallel == 0
        assert job.ppo.max_length <= run.model.seq_length
        assert job.ppo.rollout_batch_size % run.parallel.data_parallel == 0
    assert job.ppo.minibatch_size % job.train.parallel.data_parallel == 0
    assert job.train.lr_schedule["type"]
    assert job.critic.optimizer["type"] == "AdamW"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=40) | st.text(alphabet="ab:[]{}&*!?-|>%@`'\"# \n\t<1.e", max_size=40))
def test_any_text_raises_nothing_but_config_errors(text: str, directory: Path) -> None:
    path = directory / "text.yaml"
    path.write_text(text, encoding="utf-8", newline="")
    with pytest.raises(ConfigError):
        load_ppo_config(path, [text])
