import dataclasses
import json
import subprocess
import sys

import pytest
import torch

from fsdino import paper
from fsdino.adapter import BottleneckAdapter
from fsdino.config import SegmenterConfig, SegmenterShape
from fsdino.correlation import CorrelationPrior
from fsdino.decoder import MaskDecoder, PositionalEncoding, mask_downscaling
from fsdino.episodic import EpisodeBatch, segment_batch
from fsdino.errors import UserError
from fsdino.losses import mask_loss
from fsdino.prompts import SemanticVisualPrompt, contrast_prototype
from fsdino.segmenter import Segmenter
from tests.conftest import ROOT

SMALL = SegmenterConfig()
SHAPE = SegmenterShape(early_channels=6, late_channels=10, grid=6, embedding_channels=32)
LARGE = SegmenterShape(768, 768, grid=37)


def count(module, trainable_only=False):
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable_only)


def small_batch(shots=2, seed=0, grid=SHAPE.grid):
    generator = torch.Generator().manual_seed(seed)
    g = grid
    late = torch.randn(3, shots, SHAPE.late_channels, g, g, generator=generator)
    masks = torch.zeros(3, shots, 30, 30)
    masks[:, :, 5:20, 8:22] = 1
    query = torch.randn(3, SHAPE.late_channels, g, g, generator=generator)
    embedding = torch.randn(3, SHAPE.embedding_channels, g, g, generator=generator)
    return late, masks, query, embedding


def test_parameters_are_as_many_as_the_design_counts_them():
    assert count(BottleneckAdapter(768)) == 1_249_408
    assert count(MaskDecoder()) == 4_058_340
    assert count(MaskDecoder()) - count(MaskDecoder(mlp_dim=512)) == 2 * (2 * 256 + 1) * (2048 - 512)
    assert count(mask_downscaling(256)) == 4_684
    assert count(SemanticVisualPrompt(768, 256)) == 196_864
    assert count(PositionalEncoding(256)) == 256
    assert count(CorrelationPrior(37)) == 3_923_966


@pytest.mark.parametrize("sam_extras, expected", [(True, 5_509_552), (False, 4_956_748)])
def test_the_compact_model_has_five_million_parameters(sam_extras, expected):
    config = SegmenterConfig(variant="compact", sam_decoder="sam_vit_h" if sam_extras else None)
    assert count(Segmenter(config, LARGE)) == expected + 1  # the scale of the similarity map


@pytest.mark.parametrize("variant", ["compact", "4d"])
def test_copies_of_one_support_equal_one_shot(variant):
    config = dataclasses.replace(SMALL, variant=variant)
    model = Segmenter(config, SHAPE).double().eval()
    late, masks, query, embedding = (x.double() for x in small_batch(shots=1))
    one = model.segment(query, embedding, model.encode_support(late, masks))
    five = model.segment(query, embedding, model.encode_support(late.repeat(1, 5, 1, 1, 1), masks.repeat(1, 5, 1, 1)))
    torch.testing.assert_close(one.mask_logits, five.mask_logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("contrast", [True, False])
def test_void_is_neither_the_class_nor_its_background(contrast):
    config = dataclasses.replace(SMALL, contrast=contrast, support_weights="share")
    model = Segmenter(config, SHAPE).eval()
    late, masks, _, _ = small_batch()
    void = torch.zeros_like(masks)
    for one, other in zip(model.encode_support(late, masks, void), model.encode_support(late, masks), strict=True):
        torch.testing.assert_close(one, other)
    void[..., :, 25:] = 1  # whole positions of the grid, beside the object
    changed = late.clone()
    changed[..., -1] += 5
    known = model.encode_support(late, masks, void)
    for one, other in zip(known, model.encode_support(changed, masks, void), strict=True):
        torch.testing.assert_close(one, other)
    if contrast:
        plain = model.encode_support(late, masks)
        assert not torch.allclose(known.prototype, plain.prototype) and not torch.allclose(known.kernel, plain.kernel)


@pytest.mark.parametrize("variant", ["compact", "4d"])
@pytest.mark.parametrize("sam_decoder", ["sam_vit_h", None])
@pytest.mark.parametrize("semantic_prompt", [True, False])
def test_gradients_reach_every_trainable_and_no_frozen_parameter(variant, sam_decoder, semantic_prompt):
    torch.manual_seed(0)
    config = dataclasses.replace(SMALL, variant=variant, sam_decoder=sam_decoder, semantic_prompt=semantic_prompt)
    model = Segmenter(config, SHAPE).train()
    late, masks, query, embedding = small_batch()
    predicted = model.segment(query, embedding, model.encode_support(late, masks))
    label = (torch.rand(3, 24, 24) > 0.5).to(torch.uint8)
    loss = mask_loss(predicted.mask_logits, label)
    if predicted.prior_logits is not None:
        loss = loss + mask_loss(predicted.prior_logits, label)
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name
    assert not any(p.requires_grad for p in model.adapter.parameters())


def test_a_joint_adapter_is_trained_through_the_prediction():
    torch.manual_seed(0)
    model = Segmenter(dataclasses.replace(SMALL, adapter="joint"), SHAPE).train()
    late, masks, query, _ = small_batch()
    early = torch.randn(3, SHAPE.early_channels, SHAPE.grid, SHAPE.grid)
    labels = (torch.rand(3, 30, 30) > 0.5).to(torch.uint8)
    batch = EpisodeBatch([], late, masks, query, early, labels)
    predicted = segment_batch(model, batch)
    expected = model.segment(query, model.embed(early), model.encode_support(late, masks))
    assert torch.equal(predicted.mask_logits, expected.mask_logits)
    mask_loss(predicted.mask_logits, labels).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.adapter.parameters())


def test_an_empty_sparse_prompt_stands_in_when_svp_is_off():
    config = dataclasses.replace(SMALL, semantic_prompt=False)
    model = Segmenter(config, SHAPE)
    late, masks, *_ = small_batch()
    assert model.encode_support(late, masks).prompt.shape == (3, 0, 32)


def test_a_pair_is_segmented_the_same_alone_and_in_a_batch():
    model = Segmenter(SMALL, SHAPE).eval()
    late, masks, query, embedding = small_batch()
    together = model.segment(query, embedding, model.encode_support(late, masks)).mask_logits
    for i in range(3):
        alone = model.segment(
            query[i : i + 1], embedding[i : i + 1], model.encode_support(late[i : i + 1], masks[i : i + 1])
        )
        torch.testing.assert_close(together[i : i + 1], alone.mask_logits, rtol=1e-4, atol=1e-5)


def test_a_mask_smaller_than_a_cell_still_makes_a_prototype():
    model = Segmenter(SMALL, SHAPE)
    late, masks, *_ = small_batch(shots=1)
    masks.zero_()
    masks[:, :, 0, 0] = 1
    torch.testing.assert_close(model.encode_support(late, masks).prototype, late[:, 0, :, 0, 0], rtol=1e-3, atol=1e-3)


def test_a_saved_segmenter_loads_as_it_was(tmp_path):
    model = Segmenter(SMALL, SHAPE).eval()
    model.save(tmp_path, fold=2)
    loaded, record = Segmenter.load(tmp_path)
    late, masks, query, embedding = small_batch()
    with torch.no_grad():
        before, after = (
            m.segment(query, embedding, m.encode_support(late, masks)).mask_logits for m in (model, loaded)
        )
    assert record["fold"] == 2 and (loaded.config, loaded.shape) == (SMALL, SHAPE)
    assert torch.equal(before, after)


def test_a_checkpoint_of_an_unknown_version_is_refused(tmp_path):
    Segmenter(SMALL, SHAPE).save(tmp_path)
    record = json.loads((tmp_path / "segmenter.json").read_text())
    (tmp_path / "segmenter.json").write_text(json.dumps(record | {"format_version": 99}))
    with pytest.raises(UserError, match="expected format version 2, got 99"):
        Segmenter.load(tmp_path)


def test_the_similarity_scale_starts_where_the_design_says():
    model = Segmenter(dataclasses.replace(SMALL, variant="compact"), SHAPE)
    assert model.similarity_scale.item() == paper.SIMILARITY_SCALE == 10


@pytest.mark.parametrize("contrast", [True, False])
def test_a_refining_model_whose_correlation_is_silent_is_the_compact_one(contrast):
    config = dataclasses.replace(SMALL, contrast=contrast, refine=True)
    full, compact = (
        Segmenter(config, SHAPE).eval(),
        Segmenter(dataclasses.replace(config, variant="compact"), SHAPE).eval(),
    )
    compact.load_state_dict({k: v for k, v in full.state_dict().items() if not k.startswith("correlation.")})
    torch.nn.init.zeros_(full.correlation.head[-1].weight)
    late, masks, query, embedding = small_batch()
    one, other = (m.segment(query, embedding, m.encode_support(late, masks)) for m in (full, compact))
    torch.testing.assert_close(one.mask_logits, other.mask_logits)
    assert other.prior_logits is None and one.prior_logits is not None


def test_the_contrast_prototype_is_positive_exactly_nearer_to_the_object():
    torch.manual_seed(0)
    features, weights = torch.randn(1, 8, 6, 6), torch.zeros(1, 6, 6)
    weights[:, :3, :2] = 1
    direction = contrast_prototype(features, weights)
    inside = torch.nn.functional.normalize(features[0][:, weights[0] > 0].mean(1), dim=0)
    outside = torch.nn.functional.normalize(features[0][:, weights[0] == 0].mean(1), dim=0)
    for query in torch.randn(50, 8):
        assert (query @ direction[0] > 0) == (query @ inside > query @ outside)


def test_a_segmenter_is_saved_and_loaded_as_the_ecosystem_does(tmp_path, monkeypatch):
    Segmenter(SMALL, SHAPE).save(tmp_path / "trained", fold=2, backbone={"res": 70})
    model = Segmenter.from_pretrained(tmp_path / "trained")
    torch.nn.init.ones_(model.decoder.iou_token.weight)  # fine-tuned since: the hash in the record is not the old one's
    model.save_pretrained(tmp_path)
    again, record = Segmenter.load(tmp_path)
    assert record["fold"] == 2 and record["backbone"] == {"res": 70}  # what predict and evaluate need
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    asked = []
    monkeypatch.setattr("fsdino.segmenter.from_hub", lambda name: asked.append(name) or tmp_path / name.rsplit("/")[-1])
    for name in ("someone/cats", "hf:someone/cats"):
        assert Segmenter.from_pretrained(name).config == SMALL
    assert asked == ["hf:someone/cats/segmenter.safetensors", "hf:someone/cats/segmenter.json"] * 2


@pytest.mark.parametrize("place", ["nofolder", "/no/such/folder", "outputs/runs/x/final"])
def test_a_mistyped_folder_is_not_taken_for_a_repository(place):
    with pytest.raises(UserError, match=f"{place}: expected a checkpoint's folder"):
        Segmenter.from_pretrained(place)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"format_version": 1}, r"segmenter\.json: expected format version 2, got 1; train it again, or load it"),
        ([1], r"segmenter\.json: expected format version 2, got None"),
        ({"config": ...}, r"expected a segmenter's checkpoint, got another's \('config'\)"),
        (
            {"config": {"colour": 1}},
            "expected a segmenter's checkpoint, got another's .*colour",
        ),
    ],
)
def test_checkpoints_of_another_kind_end_in_one_line(tmp_path, record, said):
    Segmenter(SMALL, SHAPE).save(tmp_path)
    if isinstance(record, dict):
        record = json.loads((tmp_path / "segmenter.json").read_text()) | record
        record = {key: value for key, value in record.items() if value is not ...}
    (tmp_path / "segmenter.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=said):
        Segmenter.load(tmp_path)


def test_a_checkpoint_without_its_tensors_names_the_file(tmp_path):
    Segmenter(SMALL, SHAPE).save(tmp_path)
    (tmp_path / "segmenter.safetensors").unlink()
    with pytest.raises(UserError, match=r"expected a checkpoint with segmenter\.safetensors, found none"):
        Segmenter.load(tmp_path)


def test_tensors_that_changed_since_they_were_written_are_refused(tmp_path):
    """A flipped bit in a weight loads without an error of safetensors."""
    Segmenter(SMALL, SHAPE).save(tmp_path)
    data = bytearray((tmp_path / "segmenter.safetensors").read_bytes())
    data[-5] ^= 1
    (tmp_path / "segmenter.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=r"got a damaged one \(the SHA-256 of segmenter\.safetensors is not the one"):
        Segmenter.load(tmp_path)


@torch.no_grad()
def test_a_support_on_a_finer_grid_tells_what_its_coarser_copy_does():
    """Features and masks that are constant on blocks of 2 x 2 say the same on either grid."""
    torch.manual_seed(0)
    model = Segmenter(SMALL, SHAPE).eval()
    late, _, query, embedding = small_batch()
    masks = (torch.rand(*late.shape[:2], 6, 6) > 0.5).float()
    coarse = model.encode_support(late, masks)
    fine = model.encode_support(*(x.repeat_interleave(2, -1).repeat_interleave(2, -2) for x in (late, masks)))
    torch.testing.assert_close(fine.prototype, coarse.prototype)
    torch.testing.assert_close(fine.prompt, coarse.prompt)
    one, other = (model.segment(query, embedding, s) for s in (coarse, fine))
    # Resampling to the trained grid smooths the borders of blocks, so the correlation is alike and not equal.
    both = torch.stack([one.prior_logits.flatten(), other.prior_logits.flatten()])
    assert torch.corrcoef(both)[0, 1] > 0.9
    _, _, query, embedding = small_batch(grid=13)
    assert model.segment(query, embedding, fine).mask_logits.shape == (3, 1, 52, 52)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["compact", "4d"])
def test_halves_and_channels_last_change_little(variant):
    torch.manual_seed(0)
    model = Segmenter(dataclasses.replace(SMALL, variant=variant), SHAPE).eval()
    late, masks, query, embedding = small_batch()
    support = model.encode_support(late, masks)
    expected = model.segment(query, embedding, support).mask_logits
    with torch.autocast("cpu", torch.bfloat16):
        half = model.segment(query, embedding, support).mask_logits.float()
    assert (half - expected).abs().max() < 0.1 * expected.std()
    model, last = model.to(memory_format=torch.channels_last), torch.channels_last
    other = model.segment(query.to(memory_format=last), embedding.to(memory_format=last), support).mask_logits
    torch.testing.assert_close(other, expected, rtol=1e-4, atol=1e-5)


COMPILED = """
import sys, torch
from fsdino.config import SegmenterConfig, SegmenterShape
from fsdino.segmenter import Segmenter

class Segment(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model
    def forward(self, late, embedding, support):
        return self.model.segment(late, embedding, support)

torch.manual_seed(0)
model = Segmenter(SegmenterConfig(variant=sys.argv[1]), SegmenterShape(6, 10, 6, 32)).eval()
late, mask = torch.randn(2, 1, 10, 6, 6), torch.ones(2, 1, 30, 30)
inputs = (torch.randn(2, 10, 6, 6), torch.randn(2, 32, 6, 6))
with torch.no_grad():
    support = model.encode_support(late, mask)
    expected = model.segment(*inputs, support)
    whole = torch.compile(model.segment, fullgraph=True, backend="eager")(*inputs, support)
    exported = torch.export.export(Segment(model), (*inputs, support)).module()(*inputs, support)
assert torch.equal(whole.mask_logits, expected.mask_logits), "compiled"
assert torch.equal(exported.mask_logits, expected.mask_logits), "exported"
"""


@pytest.mark.parametrize("variant", [pytest.param("compact", marks=pytest.mark.slow), "4d"])
def test_segment_compiles_as_one_graph_and_exports_with_equal_outputs(variant):
    """In a process of its own: the shape checks of these tests are no part of what users compile."""
    done = subprocess.run([sys.executable, "-c", COMPILED, variant], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("variant", ["compact", "4d"])
def test_a_gpu_gives_the_masks_of_the_cpu(variant):
    model = Segmenter(dataclasses.replace(SMALL, variant=variant), SHAPE).eval()
    batch = small_batch()
    masks = []
    for device in ("cpu", "cuda"):
        late, mask, query, embedding = (x.to(device) for x in batch)
        here = model.to(device)
        masks.append(here.segment(query, embedding, here.encode_support(late, mask)).mask_logits.cpu())
    torch.testing.assert_close(*masks, rtol=1e-2, atol=1e-2)
