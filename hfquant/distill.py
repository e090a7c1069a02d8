"""Self-distillation: a model that is trained through quantization learns what the original says (LLM-QAT).

The loss is KL(original || student) of the next token in nats, at temperature 1. Its gradient is that of the cross
entropy with the original's soft labels (Liu et al. 2023, arXiv:2305.17888, section 2.1); unlike that, it is 0 where
both say the same, and it is what `hfquant eval` measures.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from .data import CalibrationData, batches
from .errors import SpecError, UnsupportedError
from .qat import fake_modules
from .selftext import refusal

IGNORED = -100  # label of a token that is not to be predicted
_CHUNK = 1 << 24  # logits widened to float32 at a time: 64 MiB


class _Divergence(torch.autograd.Function):
    """Sum of KL(teacher || student) over tokens, for logits [M, V]: float32. Keeps one tensor [M, V], the gradient."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        total = student.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(student)
        step = max(1, _CHUNK // student.shape[1])
        for start in range(0, student.shape[0], step):
            rows = slice(start, start + step)
            own, other = (x[rows].float().log_softmax(-1) for x in (student, teacher))
            share = other.exp()
            gradient[rows] = own.exp() - share
            total += torch.where(share > 0, share * (other - own), 0).sum()  # a token that is ruled out counts nothing
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) in nats, summed over tokens, of logits [M, V]: a float32 number.

    Differentiable once, in `student`. Raises SpecError for logits of two vocabularies.
    """
    if student.shape != teacher.shape:
        raise SpecError(
            f"the student gives logits {list(student.shape)}, the teacher {list(teacher.shape)}: a model learns from "
            "one with the same vocabulary, such as its own original"
        )
    total: Tensor = _Divergence.apply(student, teacher)
    return total


class DistillationTrainer(Trainer):
    """transformers' Trainer with the loss above in the place of the model's own, in training and evaluation.

    `teacher`: the original, in full precision. It is moved to the device of the training and set to evaluation mode; no
    gradients reach it. Rows have "input_ids" and "labels", as for any causal language model: it does not matter which
    token the label is, only that it is not -100. Positions whose next label is -100, padding say, do not count; all
    others count the same, in whichever micro-batch or process they are.

    Raises SpecError for a teacher that is the student, or prepared for training through quantization itself;
    UnsupportedError for anything but a causal language model, and for several GPUs in one process.
    """

    def __init__(self, model: Any = None, *args: Any, teacher: nn.Module, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        if {id(p) for p in teacher.parameters()} & {id(p) for p in self.model.parameters()}:
            raise SpecError(
                "the teacher shares parameters with the model that is trained, and would change with it: give it a "
                "copy that was made before (copy.deepcopy, or from_pretrained again)"
            )
        if next(fake_modules(teacher), None):
            raise SpecError("the teacher is prepared for quantization: make the copy before prepare_qat")
        if reason := refusal(type(self.model), self.model.config):
            raise UnsupportedError(f"{reason}: distillation is for causal language models")
        if self.args.n_gpu > 1:
            raise UnsupportedError(
                f"{self.args.n_gpu} GPUs in one process: start a process for each, with torchrun or accelerate launch"
            )
        self.teacher = teacher.to(self.args.device).eval()
        self.model_accepts_loss_kwargs = True  # the loss is divided by the tokens of all micro-batches, see below

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a micro-batch: its sum over `num_items_in_batch`, the tokens of all micro-batches of the step.

        Raises SpecError for rows without labels, and for a teacher with another vocabulary.
        """
        if "labels" not in inputs:
            raise SpecError('rows have no "labels": give those of a language model, -100 for tokens that do not count')
        given = {name: value for name, value in inputs.items() if name != "labels"}
        labels: Tensor = inputs["labels"]
        outputs = model(**given)
        with torch.no_grad(), self.accelerator.autocast():  # in the precision that the student has
            wanted = self.teacher(**given).logits
        counts = labels[:, 1:] != IGNORED
        loss = divergence(outputs.logits[:, :-1][counts], wanted[:, :-1][counts])
        if num_items_in_batch is None:
            loss = loss / counts.sum().clamp_min(1)
        else:
            loss = loss / num_items_in_batch
            if (
                self.args.average_tokens_across_devices
            ):  # gradients are averaged, and the count is that of all processes
                loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return (loss, outputs) if return_outputs else loss


def self_dataset(
    model: Any, samples: int, length: int, tokenizer: Any = None, seed: int = 0, batch_size: int = 8
) -> list[dict[str, Tensor]]:
    """Rows for a Trainer that `model` writes itself (see `self_text`): "input_ids" and "labels" [length] int64.

    `tokenizer`: tells how texts begin, and which tokens are special. Raises CalibrationError for models that cannot
    write text, SpecError if `length` leaves nothing to write.
    """
    wanted = CalibrationData("self", samples, length, batch_size, seed)
    written = [row for batch in batches(wanted, tokenizer, model.config, model) for row in batch["input_ids"]]
    return [{"input_ids": row, "labels": row} for row in written]
