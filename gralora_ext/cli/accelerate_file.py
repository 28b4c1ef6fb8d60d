# SPDX-License-Identifier: Apache-2.0
"""Accelerate's own configuration file, as ``accelerate config`` writes it, for what ``--num-processes`` starts."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from ..program.errors import JobError, first_sentence


def read(file: Path, size: int | None) -> tuple[dict[str, str], int]:
    """What ``accelerate launch --config_file FILE`` gives its processes as environment, and how many of them there are.

    ``size``, where it is given, has precedence over the file's ``num_processes``.
    """
    from accelerate.commands import launch
    from accelerate.utils import launch as environments

    logging.getLogger("accelerate").setLevel(logging.ERROR)
    words = ["--config_file", str(file), *(() if size is None else ("--num_processes", str(size))), "finetune"]
    try:
        if not file.is_file():
            raise ValueError("there is no such file")
        arguments, defaults, of_file = launch._validate_launch_command(launch.launch_command_parser().parse_args(words))
        if (arguments.num_machines or 1) > 1:
            raise ValueError(f"it is for {arguments.num_machines} machines: use `accelerate launch` on each")
        if arguments.tpu or arguments.use_megatron_lm or defaults.compute_environment != "LOCAL_MACHINE":
            raise ValueError("TPU, Megatron-LM and SageMaker are not what finetune runs on")
        arguments.main_process_port = 0  # any; ours is another
        before = dict(os.environ)
        if arguments.use_deepspeed:
            fields = [*defaults.deepspeed_config, *(("mixed_precision",) if of_file else ())]
            arguments.deepspeed_fields_from_accelerate_config = ",".join(fields)
            environment = environments.prepare_deepspeed_cmd_env(arguments)[1]
        elif arguments.use_fsdp or arguments.multi_gpu:
            environment = environments.prepare_multi_gpu_env(arguments)
        else:
            environment = environments.prepare_simple_launcher_cmd_env(arguments)[1]
    except SystemExit:
        raise JobError(f"--accelerate-config: {file} holds what accelerate launch does not take") from None
    except Exception as error:  # yaml's, accelerate's, and those of the file's own values
        raise JobError(f"--accelerate-config: {file} cannot be used: {first_sentence(error)}") from error
    if "OMP_NUM_THREADS" not in before:
        environment.pop("OMP_NUM_THREADS", None)  # accelerate's choice is 1
    return environment, arguments.num_processes
