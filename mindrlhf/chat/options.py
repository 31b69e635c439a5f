"""What ``chat.py`` is told on its command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mindrlhf.utils.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """The flags of ``chat.py``; see its ``--help``."""

    checkpoint: Path
    compare: Path | None = None
    config: Path | None = None
    tokenizer_path: Path | None = None
    prompt_file: Path | None = None
    output_file: Path | None = None
    skip_bad_lines: bool = False
    batch_size: int = 8
    system_prompt: str | None = None
    no_chat_template: bool = False
    max_tokens: int = 256
    max_context: int = 0
    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 0
    greedy: bool = False
    seed: int = 1
    device_target: str | None = None

    def checked(self) -> ChatOptions:
        """Itself.

        Raises:
            ConfigError: every flag that is out of its range, or needs another.
        """
        rules = {
            f"--max_tokens {self.max_tokens}: must be positive": self.max_tokens >= 1,
            f"--max_context {self.max_context}: must not be negative": self.max_context >= 0,
            f"--batch_size {self.batch_size}: must be positive": self.batch_size >= 1,
            f"--temperature {self.temperature:g}: must be positive; --greedy takes the likeliest token": (
                self.temperature > 0
            ),
            f"--top_p {self.top_p:g}: must lie in (0, 1]; 1 is off": 0 < self.top_p <= 1,
            f"--top_k {self.top_k}: must not be negative; 0 is off": self.top_k >= 0,
            "--output_file goes with --prompt_file": self.output_file is None or self.prompt_file is not None,
            "--system_prompt has no place without the chat template: leave --no_chat_template out": (
                not (self.no_chat_template and self.system_prompt)
            ),
        }
        faults = [fault for fault, holds in rules.items() if not holds]
        if faults:
            raise ConfigError(faults)
        return self
