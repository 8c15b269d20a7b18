"""What the devices achieve in a step: FLOPs of the models over the seconds of their phases.

The FLOPs are those of `megaopd.plan.cost` for the tokens that the step really had: what the
mathematics asks for, without what activations recomputed, padding or a schedule's bubbles add. So
the share of the peak is the MFU of Chowdhery et al. (arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from megaopd.batch import Sample
from megaopd.config import Config
from megaopd.losses.objective import needs_teacher
from megaopd.models.arch import ModelArch
from megaopd.models.mapping import padded_vocab_size
from megaopd.plan.cost import head_flops, samples_flops


class Throughput:
    """Called with a step's samples and times, it gives metrics of the step; equal on every rank.

    Args:
        config: the run.
        student: its architecture.
        teachers: those of the teachers, by the name that `Prompt.teacher` holds, members of
            averages too.
        world_size: ranks of the run, a device each.
        peak: peak TFLOP/s of a device (`megaopd.plan.machine.peak_tflops`); None gives no MFU.
        scores: whether a step asks the teacher, though the loss may not.
    """

    def __init__(
        self,
        config: Config,
        student: ModelArch,
        teachers: Mapping[str, ModelArch],
        world_size: int,
        peak: float | None,
        scores: bool = False,
    ) -> None:
        self.config, self.student, self.teachers = config, student, teachers
        self.world_size, self.peak = world_size, peak
        self._asks_teacher = scores or needs_teacher(config.loss)

    def __call__(self, samples: Sequence[Sample], times: Mapping[str, float]) -> dict[str, float]:
        """`perf/tflops_per_gpu`, `perf/mfu` of the student's phase and `perf/teacher_tflops`.

        Args:
            times: of the phases, as `PhaseTimer.metrics` gives them.
        """
        metrics = {}
        if student := self._per_device(self.student_flops(samples), times.get("time/student_s")):
            metrics["perf/tflops_per_gpu"] = student
            if self.peak is not None:
                metrics["perf/mfu"] = student / self.peak
        if teacher := self._per_device(self.teacher_flops(samples), times.get("time/teacher_s")):
            metrics["perf/teacher_tflops"] = teacher
        return metrics

    def student_flops(self, samples: Sequence[Sample]) -> float:
        """Forward and backward of the student, with the logits of both sides at the loss tokens.

        A backward pass costs two forward passes. Weights below LoRA adapters need no gradient of
        their own, which is one of the two; the adapters' own products are left out.
        """
        lengths = [len(s.prompt.token_ids) + len(s.response_ids) for s in samples]
        products, attention = samples_flops(self.student, lengths)
        lora = self.config.student.lora is not None
        hidden_size = self.student.hidden_size
        flops = (2 if lora else 3) * products + 3 * attention
        vocab = padded_vocab_size(self.student.vocab_size, self.config.parallel.tensor)
        for name, own in self._by_teacher(samples).items():
            tokens = sum(sum(s.response_mask) for s in own)
            width = sum(arch.hidden_size for arch in self._models(name))
            flops += head_flops(vocab, hidden_size, width, tokens)
            if lora:
                flops -= 2 * vocab * hidden_size * tokens
        return flops

    def teacher_flops(self, samples: Sequence[Sample]) -> float:
        """Forward of the teachers that compute on the run's ranks; 0 where nobody asks them."""
        flops = 0.0
        for name, own in self._by_teacher(samples).items():
            prompts = [s.prompt.teacher_token_ids or s.prompt.token_ids for s in own]
            lengths = [len(p) + len(s.response_ids) for p, s in zip(prompts, own, strict=True)]
            flops += sum(sum(samples_flops(arch, lengths)) for arch in self._models(name))
        return flops

    def _models(self, name: str) -> list[ModelArch]:
        """The models that score the samples of a teacher on this run's ranks."""
        own = self.config.teachers[name] if name else self.config.teacher
        if not self._asks_teacher or own.kind == "sglang":
            return []
        return [self.teachers[member] for member in (own.members or (name,))]

    def _by_teacher(self, samples: Sequence[Sample]) -> dict[str, list[Sample]]:
        found = defaultdict(list)
        for sample in samples:
            found[sample.prompt.teacher].append(sample)
        return found

    def _per_device(self, flops: float, seconds: float | None) -> float | None:
        """TFLOP/s of a device; None where there is nothing to divide."""
        if not flops or not seconds:
            return None
        return flops / seconds / self.world_size / 1e12
