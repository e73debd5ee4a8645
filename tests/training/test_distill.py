"""`distillation_loss` against its formula, written out."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import dspfx
from helpers import assert_equal


def by_hand(student: Tensor, teacher: Tensor, temperature: float) -> float:
    """The mean over the rows of the divergence, number by number."""
    total = 0.0
    for s, t in zip(
        (student / temperature).tolist(), (teacher / temperature).tolist(), strict=True
    ):
        p = [math.exp(a) / sum(map(math.exp, s)) for a in s]
        q = [math.exp(a) / sum(map(math.exp, t)) for a in t]
        total += sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
    return total / len(student)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_formula(temperature: float) -> None:
    student, teacher = torch.randn(2, 5, 3, dtype=torch.float64)
    labels = torch.tensor([0, 2, 1, 1, 0])
    soft = temperature**2 * by_hand(student, teacher, temperature)
    hard = float(F.cross_entropy(student, labels))
    alone = dspfx.distillation_loss(student, teacher, temperature=temperature)
    assert float(alone) == pytest.approx(soft)
    for target in (labels, F.cross_entropy(student, labels)):
        both = dspfx.distillation_loss(
            student, teacher, target, temperature=temperature, weight=0.3
        )
        assert float(both) == pytest.approx(0.7 * hard + 0.3 * soft)


def test_equal_answers_cost_nothing_and_the_teacher_learns_nothing() -> None:
    student = torch.randn(4, 6, requires_grad=True)
    teacher = student.detach().clone().requires_grad_()
    nothing = dspfx.distillation_loss(student, teacher + 3.0).detach()
    assert float(nothing) == pytest.approx(0, abs=1e-6)
    dspfx.distillation_loss(student, 2 * teacher).backward()
    assert teacher.grad is None
    assert float(student.grad.abs().max()) > 0


def test_gradients_are_of_one_size_at_every_temperature() -> None:
    """At high temperatures they tend to (s - t) / classes, each less its mean (Hinton et al.)."""
    student = torch.randn(1, 8, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(1, 8, dtype=torch.float64)
    dspfx.distillation_loss(student, teacher, temperature=1e4).backward()
    difference = student.detach() - teacher
    assert torch.allclose(student.grad, (difference - difference.mean()) / 8, atol=1e-3)


def test_positions_and_half_precision() -> None:
    student, teacher = torch.randn(2, 2, 5, 3, 3)
    labels = torch.randint(5, (2, 3, 3))
    images = dspfx.distillation_loss(student, teacher, labels, temperature=2)
    rows = [x.permute(0, 2, 3, 1).reshape(-1, 5) for x in (student, teacher)]
    assert float(images) == pytest.approx(
        float(dspfx.distillation_loss(*rows, labels.flatten(), temperature=2)), rel=1e-5
    )
    with torch.autocast("cpu", torch.bfloat16):
        low = dspfx.distillation_loss(student.bfloat16(), teacher, labels, temperature=2)
    assert low.dtype == torch.float32
    assert float(low) == pytest.approx(float(images), rel=0.05)


@pytest.mark.parametrize("student_too", [False, True])
def test_classes_that_are_ruled_out_cost_nothing(student_too: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(5, 4, generator=generator) for _ in range(2))
    teacher[:, 2] = -torch.inf
    student[:, 2] = -torch.inf if student_too else student[:, 2]
    student.requires_grad_()
    left = [0, 1, 3]
    log_q = torch.log_softmax(teacher[:, left] / 4, 1)
    log_p = torch.log_softmax(student / 4, 1)[:, left]
    loss = dspfx.distillation_loss(student, teacher, temperature=4.0)
    assert_equal(16 * (log_q.exp() * (log_q - log_p)).sum(1).mean(), loss, 1e-6)
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.isfinite().all()


def test_what_does_not_fit() -> None:
    logits = torch.randn(4, 3)
    for student, teacher, target, settings, message in (
        (logits, logits, None, {"temperature": 0.0}, "temperature must be positive"),
        (logits, logits, None, {"weight": 1.1}, "weight must be in"),
        (logits, logits[:, :2], None, {}, "one shape"),
        (logits[0], logits[0], None, {}, "one shape"),
        (logits, logits, torch.zeros(3, dtype=torch.int64), {}, "labels of shape"),
        (logits, logits, torch.zeros(4), {}, "labels of shape"),
    ):
        with pytest.raises(dspfx.LearnError, match=message):
            dspfx.distillation_loss(student, teacher, target, **settings)
