# SPDX-License-Identifier: Apache-2.0
"""``--report-to``: transformers' own callbacks send the figures of each step; here they are told where, and tried."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..program.errors import JobError, first_sentence


def open_reporters(options: Any, folder: Path) -> None:
    """Prepares what is reported to, before the first figure: a program that refuses is a JobError, and not a lost job."""
    for name in options.report_to or []:
        if name == "tensorboard":
            os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "tensorboard")  # read when the callback is made
        if name == "wandb":
            import wandb

            try:
                project = os.environ.get("WANDB_PROJECT", "gralora-ext")
                wandb.init(project=project, name=options.run_name, dir=str(folder))
            except Exception as error:  # its own, the network's, the service's
                raise JobError(
                    f"--report-to wandb: {first_sentence(error)} (`wandb login`, or WANDB_MODE=offline)"
                ) from error
