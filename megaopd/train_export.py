"""What a run leaves of the student: a Hugging Face directory, adapters, a Megatron checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megaopd.config import Config

if TYPE_CHECKING:
    from megaopd.engine.student import MegatronStudent
    from megaopd.inputs import Inputs


def export_student(config: Config, student: MegatronStudent, inputs: Inputs) -> str | None:
    """Writes the student as the configuration asks, to run.dir/hf, run.dir/adapter and
    run.dir/megatron; collective. Returns the Hugging Face directory."""
    from megaopd.models.hf_io import HFWriter

    run_dir = Path(config.run.dir)
    if config.train.export_megatron:
        student.save(run_dir / "megatron", config.student.path)
    if not config.train.export:
        return None
    export_adapter(config, student, inputs, run_dir / "adapter")
    destination = run_dir / "hf"
    if student.groups.rank == 0:
        with HFWriter(destination, config.student.path, inputs.student_arch, overwrite=True) as out:
            out.add_all(student.export_weights())
    else:
        for _ in student.export_weights():
            pass
    return str(destination)


def export_adapter(
    config: Config, student: MegatronStudent, inputs: Inputs, directory: Path
) -> None:
    """Writes the LoRA adapters, if there are any, to `directory` as PEFT does; collective."""
    from megaopd.models.build import DTYPES
    from megaopd.models.hf_io.adapter import adapter_config, write_adapter
    from megaopd.models.lora_spec import adapter_mappings, targets

    lora, arch = config.student.lora, inputs.student_arch
    if lora is None:
        return
    if student.groups.rank == 0:
        write_adapter(
            directory,
            adapter_config(lora, targets(arch, lora), config.student.path),
            adapter_mappings(arch, lora).values(),
            student.export_adapter(),
            DTYPES[config.student.dtype],
        )
    else:
        for _ in student.export_adapter():
            pass
