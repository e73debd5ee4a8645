"""`distillation_loss`: a pruned network learns from the outputs of the dense one."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from dspfx.errors import LearnError


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float = 4.0,
    weight: float = 0.9,
) -> Tensor:
    """The loss of a student that learns from the teacher's outputs and from the labels.

    With the logits `s` and `t`, the temperature `T` and the weight `w`,

        loss = (1 - w) * task + w * T^2 * KL,
        KL   = batch mean of sum_c q_c log(q_c / p_c),  p = softmax(s / T),  q = softmax(t / T)

    Gradients of the second term shrink with `1 / T^2`, which the factor makes up for, so that `w`
    means the same at every temperature (Hinton, Vinyals, Dean, "Distilling the Knowledge in a
    Neural Network", 2015, arXiv 1503.02531). It is computed in float32 at least, also under
    autocast, and no gradient goes to the teacher.

    Args:
        student_logits: `[N, classes]`, or `[N, classes, ...]` of several positions, over which the
            mean is taken, too.
        teacher_logits: of the same shape.
        target: the labels, int64 `[N]` or `[N, ...]`, for which `task` is the cross-entropy; or
            `task` itself, a scalar that you computed; None if there is nothing but the teacher
            to learn from, and `w` is 1.
        temperature: T.
        weight: w, in [0, 1].

    Returns:
        A scalar.

    Raises:
        LearnError: shapes that do not fit, a setting out of range, or a `target` that is neither
            labels nor a scalar loss.

    Example:
        >>> student, teacher = torch.randn(4, 10, requires_grad=True), torch.randn(4, 10)
        >>> loss = dspfx.distillation_loss(student, teacher, torch.tensor([1, 0, 3, 2]))
        >>> loss.backward()
        >>> student.grad.shape
        torch.Size([4, 10])
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise LearnError(f"temperature must be positive, got {temperature}")
    if not 0 <= weight <= 1:
        raise LearnError(f"weight must be in [0, 1], got {weight}")
    if student_logits.shape != teacher_logits.shape or student_logits.dim() < 2:
        raise LearnError(
            f"the logits of student and teacher must have one shape [N, classes, ...], got "
            f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        )
    with torch.autocast(student_logits.device.type, enabled=False):
        student, teacher = _wide(student_logits), _wide(teacher_logits.detach())
        learned = F.log_softmax(student / temperature, 1)
        known = F.log_softmax(teacher / temperature, 1)
        least = torch.finfo(known.dtype).min  # classes that are ruled out have none
        learned, known = learned.clamp(min=least), known.clamp(min=least)
        divergence = F.kl_div(learned, known, reduction="none", log_target=True).sum(1).mean()
        soft = temperature**2 * divergence
        if target is None:
            return soft
        return (1 - weight) * _task(student, target) + weight * soft


def _task(student: Tensor, target: Tensor) -> Tensor:
    if target.is_floating_point() and target.dim() == 0:
        return target
    positions = (len(student), *student.shape[2:])
    if target.dtype not in (torch.int64, torch.uint8) or target.shape != positions:
        raise LearnError(
            f"target must be a scalar loss, or int64 labels of shape {positions}; got "
            f"{target.dtype} {tuple(target.shape)}"
        )
    return F.cross_entropy(student, target)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
