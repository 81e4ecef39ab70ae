import math

import pytest
import torch

from fsdino.losses import dice_loss, distillation_loss, mask_loss


def test_dice_is_as_computed_by_hand():
    probability, target = torch.tensor([[[0.5, 1.0], [0.0, 0.25]]]), torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])
    overlap, total = 1.5, 1.75 + 2
    assert dice_loss(probability, target).item() == pytest.approx(1 - (2 * overlap + 1) / (total + 1))


def test_mask_loss_is_as_computed_by_hand():
    logits = torch.tensor([[[[0.0, 2.0], [-1.0, 0.0]]]])
    label = torch.tensor([[[1, 1], [0, 0]]], dtype=torch.uint8)
    p = [1 / (1 + math.exp(-x)) for x in (0.0, 2.0, -1.0, 0.0)]
    bce = -(math.log(p[0]) + math.log(p[1]) + math.log(1 - p[2]) + math.log(1 - p[3])) / 4
    dice = 1 - (2 * (p[0] + p[1]) + 1) / (sum(p) + 2 + 1)
    assert mask_loss(logits, label).item() == pytest.approx(bce + dice, rel=1e-5)


def test_void_pixels_are_in_neither_term():
    logits = torch.tensor([[[[0.3, -0.7], [5.0, 1.0]]]], requires_grad=True)
    label = torch.tensor([[[1, 0], [255, 1]]], dtype=torch.uint8)
    loss = mask_loss(logits, label)
    loss.backward()
    assert logits.grad[0, 0, 1, 0] == 0 and logits.grad[0, 0, 0, 0] != 0
    p = [1 / (1 + math.exp(-x)) for x in (0.3, -0.7, 1.0)]
    bce = -(math.log(p[0]) + math.log(1 - p[1]) + math.log(p[2])) / 3
    assert loss.item() == pytest.approx(bce + 1 - (2 * (p[0] + p[2]) + 1) / (sum(p) + 2 + 1), rel=1e-5)


def test_an_all_void_label_gives_no_gradient():
    logits = torch.randn(1, 1, 4, 4, requires_grad=True)
    mask_loss(logits, torch.full((1, 4, 4), 255, dtype=torch.uint8)).backward()
    assert logits.grad.abs().sum() == 0


def test_the_teacher_is_averaged_over_the_area_of_each_student_position():
    teacher = torch.arange(16.0).view(1, 1, 4, 4)
    student = torch.tensor([[[[2.5, 4.5], [10.5, 12.5]]]])
    assert distillation_loss(student, teacher).item() == 0
    assert distillation_loss(student + 2, teacher).item() == pytest.approx(4)


def test_parts_of_a_batch_have_its_loss_as_their_mean_whatever_is_void():
    torch.manual_seed(0)
    logits, label = torch.randn(4, 1, 6, 6), torch.randint(0, 2, (4, 6, 6), dtype=torch.uint8)
    label[0, :5] = 255
    label[1, :2] = 255
    whole = mask_loss(logits, label)
    pixels = (label != 255).sum() / 2
    parts = [mask_loss(logits[i : i + 2], label[i : i + 2], pixels) for i in (0, 2)]
    assert sum(parts).item() / 2 == pytest.approx(whole.item(), rel=1e-6)
    alone = [mask_loss(logits[i : i + 2], label[i : i + 2]) for i in (0, 2)]
    assert sum(alone).item() / 2 != pytest.approx(whole.item(), rel=1e-3)
