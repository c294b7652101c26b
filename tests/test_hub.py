"""Plans and profiles on the Hugging Face Hub, by huggingface_hub and a server on the loopback that stands for the Hub."""

import re
import socket
from dataclasses import replace

import huggingface_hub
import pytest
import torch
from budget import flux
from hub import TOKEN, Hub, served
from huggingface_hub import ModelCard, constants
from pipelines import BENCHES
from replay import distance, random_grid, trace
from replay import plan as plan_for
from test_stack import replayed
from untouched import left_as_it_was

import arrowhead as ah
from arrowhead.errors import CardKept, HubUnavailable, InputsInvalid, PlanInvalid, PlanMismatch
from arrowhead.plans.cells import FULL

STEPS = 8
NAME = "org/fast"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty Hub, which huggingface_hub takes for the real one."""
    try:
        socket.create_server(("127.0.0.1", 0)).close()
    except OSError as error:
        pytest.skip(f"no server can be started on the loopback: {error}")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    with served(Hub()) as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", found.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "downloads"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        huggingface_hub.utils.disable_progress_bars()
        yield found
        huggingface_hub.utils.enable_progress_bars()


@pytest.fixture(scope="module")
def bench():
    return BENCHES["dit"]()


@pytest.fixture(scope="module")
def profile(bench):
    return ah.profile(bench.pipe, bench.inputs(steps=STEPS, guidance=3.0), progress=False)


def same(a, b):
    """Whether two profiles are the same, but for the rounding of a file."""
    return a.target == b.target and torch.equal(a.products, b.products) and a.sampler_gains == b.sampler_gains


def plan_of(bench, seed=0, **about):
    return replace(plan_for(bench, random_grid(seed, STEPS, 3)), about=about)


def card_on(hub, name=NAME, branch="main"):
    return ModelCard(hub.at(name, branch)["files"]["README.md"].decode())


def test_a_profile_is_pushed_and_read_by_another(hub, bench, profile):
    address = profile.push_to_hub(NAME, private=True, commit_message="by a test")
    (commit,) = hub.repos[NAME]["main"]
    assert address == f"{hub.url}/{NAME}/commit/{commit['oid']}"
    assert (sorted(commit["files"]), commit["message"]) == (["README.md", "profile.safetensors"], "by a test")
    assert hub.private == {NAME}
    assert same(ah.Profile.from_pretrained(NAME), profile)
    assert any(f"arrowhead/{ah.__version__}" in agent for _, path, agent in hub.asked if "resolve" in path)
    with pytest.raises(HubUnavailable, match=r"cannot read profile.safetensors of org/fast at its main branch: .*check"):
        ah.Profile.from_pretrained(NAME, token=False, force_download=True)


def test_a_plan_is_pushed_and_read_by_another(hub, bench):
    plan = plan_of(bench)
    plan.push_to_hub(NAME, token=TOKEN)
    read = ah.Plan.from_pretrained(NAME)
    assert read == plan
    assert hub.at(NAME, "main")["files"]["plan.json"].decode() == plan.text()
    assert NAME not in hub.private


def test_a_revision_is_a_branch_or_a_commit(hub, bench):
    first, second, third = (plan_of(bench, seed) for seed in range(3))
    oid = first.push_to_hub(NAME).rpartition("/")[2]
    second.push_to_hub(NAME)
    for plan in (second, third):
        plan.push_to_hub(NAME, branch="strong")
    assert len({first.cells, second.cells, third.cells}) == 3
    for revision, wanted in {None: second, "main": second, oid: first, "strong": third}.items():
        assert ah.Plan.from_pretrained(NAME, revision=revision) == wanted
    with pytest.raises(HubUnavailable, match=r"at v9: .*wanted a repository that has this file"):
        ah.Plan.from_pretrained(NAME, revision="v9")


def test_offline_what_was_downloaded_is_read(hub, bench, monkeypatch, tmp_path):
    old, new = plan_of(bench, 0), plan_of(bench, 1)
    old.push_to_hub(NAME)
    assert ah.Plan.from_pretrained(NAME, cache_dir=tmp_path / "own") == old
    new.push_to_hub(NAME)
    asked = len(hub.asked)
    assert ah.Plan.from_pretrained(NAME, cache_dir=tmp_path / "own", local_files_only=True) == old
    assert len(hub.asked) == asked
    with pytest.raises(HubUnavailable, match="or one downloaded before"):
        ah.Plan.from_pretrained(NAME, local_files_only=True)  # in another folder
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    try:
        assert ah.Plan.from_pretrained(NAME, cache_dir=tmp_path / "own") == old
        with pytest.raises(HubUnavailable, match="offline"):
            new.push_to_hub(NAME)
    finally:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        huggingface_hub.close_session()
    assert len(hub.asked) == asked
    assert ah.Plan.from_pretrained(NAME, cache_dir=tmp_path / "own") == new


def test_a_file_on_the_hub_goes_through_the_loaders_of_files(hub, bench, profile, monkeypatch):
    hub.repos[NAME] = {"main": []}
    hub.commit(NAME, "main", {"plan.json": b'{"format": 6}', "profile.safetensors": b"\x80\x04K\x01."})
    with pytest.raises(PlanInvalid, match="no sound plan"):
        ah.Plan.from_pretrained(NAME)
    with pytest.raises(InputsInvalid, match="no sound profile"):
        ah.Profile.from_pretrained(NAME)


def test_nothing_too_large_is_downloaded(hub):
    hub.repos[NAME] = {"main": []}
    hub.commit(NAME, "main", {"plan.json": b"{}"})
    hub.sizes["plan.json"] = 2**40
    with pytest.raises(HubUnavailable, match="has 1099511627776 bytes, wanted 16777216 at most; it was not downloaded"):
        ah.Plan.from_pretrained(NAME)
    assert {verb for verb, path, _ in hub.asked if "resolve" in path} == {"HEAD"}


@pytest.mark.parametrize("name", ["org/none", "no such name", "a/b/c", "", "a" * 300], ids=lambda name: name[:12])
def test_repositories_that_are_not_there(hub, name):
    with pytest.raises((HubUnavailable, InputsInvalid), match="wanted"):
        ah.Plan.from_pretrained(name)


@pytest.mark.parametrize("token", ["hf_wrong", False], ids=str)
def test_pushing_without_permission(hub, bench, token):
    with pytest.raises(HubUnavailable, match=r"cannot push plan.json to org/fast: .*401 Unauth.*token \(hf auth login\)"):
        plan_of(bench).push_to_hub(NAME, token=token)
    assert hub.repos == {}


def test_a_hub_that_is_down(bench, monkeypatch, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}"
    )
    with pytest.raises(HubUnavailable, match="cannot push"):
        plan_of(bench).push_to_hub(NAME)


def test_the_card_of_a_profile(hub, profile):
    about = {**profile.about, "model": "maker/model-1.5"}
    measured = {"40 %": {"lpips": 0.00028, "psnr": 39.251}, "20 %": {"lpips": 0.0049}}
    replace(profile, about=about).push_to_hub(NAME, measured=measured)
    card = card_on(hub)
    assert (card.data.library_name, card.data.base_model) == ("arrowhead", "maker/model-1.5")
    assert "arrowhead" in card.data.tags
    tables = tables_of(card.text)
    rows = {float(row[0]): row for row in tables["Budgets"][1:]}
    assert len(rows) >= 3
    for allowed, row in rows.items():
        plan = ah.solve(profile, ah.Budget(transformer_flops=allowed))
        search = plan.about["search"]
        assert int(row[1]) == plan.count()["full"]
        assert float(row[2].rstrip("%")) / 100 == pytest.approx(search["transformer_flops"], abs=1e-3)
        assert float(row[4]) == pytest.approx(search["predicted_error"], rel=1e-2)
        left = (plan.count()["full"] + (STEPS - plan.count()["full"]) * profile.skipped_seconds) / STEPS
        assert float(row[3]) == pytest.approx(1 / left, abs=0.006)
    assert tables["Measured"] == [["plan", "lpips", "psnr"], ["40 %", "0.00028", "39.25"], ["20 %", "0.0049", ""]]
    assert ["torch", torch.__version__] in tables["Versions"]
    assert any(name == "inputs" and '"guidance_scale": 3.0' in value for name, value in tables["Settings"])


def tables_of(text):
    """The tables of a card by the headings above them, without the escapes of Markdown."""
    found, name = {}, ""
    for line in text.splitlines():
        if line.startswith("## "):
            name = line[3:]
        elif line.startswith("| ") and "---" not in line:
            cells = re.split(r"(?<!\\)\|", line)[1:-1]
            found.setdefault(name, []).append([re.sub(r"\\(.)", r"\1", cell.strip()) for cell in cells])
    return found


def test_the_card_of_a_plan(hub, bench):
    search = {"strategy": "budget", "asked": "module_flops = 0.4", "predicted_error": 0.03}
    plan = plan_of(bench, 3, search=search, model="/srv/somebody/private/model", pipeline="DiTPipeline")
    plan.push_to_hub(NAME)
    card = card_on(hub)
    assert card.data.base_model is None
    assert "somebody" not in card.content
    facts = dict(tables_of(card.text)[""][1:])
    assert facts["steps"] == str(STEPS)
    assert facts["predicted error"] == "0.03"
    assert facts["FLOPs left of the modules that the plan speaks of"] == f"{plan.flops().module:.1%}"
    assert ["asked", "module_flops = 0.4"] in tables_of(card.text)["Settings"]
    assert f"ah.Plan.from_pretrained('{NAME}')" in card.text


def test_what_others_wrote_steers_no_card(bench):
    evil = "x|y\n---\nbase_model: evil/model\n# <script>alert(1)</script> [a](http://b) \x1b[31m"
    plan = plan_of(bench, search={"strategy": evil, evil: 1}, model="a/b\nlicense: evil", inputs={"prompt": evil})
    text = plan.card(NAME).text({evil: {evil: 1.0}})
    assert ModelCard(text).data.to_dict() == {"library_name": "arrowhead", "tags": ["arrowhead", "diffusers"]}
    body = text.split("---\n", 2)[2]
    assert not re.search(r"(?<!\\)<|(?<!\\)\[(?!\w)|\x1b|^# <|^base_model", body, re.MULTILINE)
    assert [len(row) for row in tables_of(text)["Measured"]] == [2, 2]


def test_entries_that_others_wrote_are_shown_as_they_are(bench):
    assert ["watched", "5"] in tables_of(plan_of(bench, watched=5).card(NAME).text())["Settings"]


def test_a_card_that_others_wrote_is_left(hub, bench):
    theirs = b"---\nlicense: mit\nlibrary_name: diffusers\n---\n# A model\n"
    hub.repos[NAME] = {"main": []}
    hub.commit(NAME, "main", {"README.md": theirs})
    plan = plan_of(bench)
    with pytest.warns(CardKept, match="org/fast has a README.md that arrowhead did not write"):
        plan.push_to_hub(NAME)
    files = hub.at(NAME, "main")["files"]
    assert (files["README.md"], files["plan.json"].decode()) == (theirs, plan.text())


def test_a_card_that_is_too_large_is_not_downloaded(hub, bench):
    hub.repos[NAME] = {"main": []}
    hub.commit(NAME, "main", {"README.md": b"library_name: arrowhead\n"})
    hub.sizes["README.md"] = 2**40
    with pytest.warns(CardKept):
        plan_of(bench).push_to_hub(NAME)
    assert not [path for verb, path, _ in hub.asked if verb == "GET" and path.endswith("README.md")]


def test_a_card_of_others_in_a_folder_is_left(bench, tmp_path):
    theirs, plan = b"---\nlicense: mit\n---\n# A model\n", plan_of(bench)
    (tmp_path / "README.md").write_bytes(theirs)
    with pytest.warns(CardKept, match=r"has a README.md that arrowhead did not write"):
        plan.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == theirs
    assert ah.Plan.from_pretrained(tmp_path) == plan
    (tmp_path / "README.md").unlink()
    for _ in range(2):  # arrowhead's own card is written anew
        plan.save_pretrained(tmp_path)
    assert f"ah.Plan.from_pretrained({str(tmp_path)!r})" in (tmp_path / "README.md").read_text()


def test_a_card_names_the_repository_with_its_owner(hub, bench):
    plan_of(bench).push_to_hub("fast")
    assert "ah.Plan.from_pretrained('me/fast')" in card_on(hub, "me/fast").text


def test_what_is_downloaded_is_of_the_commit_whose_size_was_asked(hub, bench, monkeypatch):
    old, new = plan_of(bench, 0), plan_of(bench, 1)
    old.push_to_hub(NAME)
    at = hub.at

    def moving(name, revision):
        found = at(name, revision)
        if revision == "main" and len(hub.repos[NAME]["main"]) == 1:
            hub.commit(NAME, "main", {"plan.json": new.text().encode()})
        return found

    monkeypatch.setattr(hub, "at", moving)
    assert ah.Plan.from_pretrained(NAME) == old
    assert len(hub.repos[NAME]["main"]) == 2
    assert ah.Plan.from_pretrained(NAME, local_files_only=True) == old
    assert ah.Plan.from_pretrained(NAME) == new


def test_folders_and_files_are_read_like_repositories(bench, profile, tmp_path):
    plan = plan_of(bench, 4)
    plan.save_pretrained(tmp_path / "both")
    profile.save_pretrained(tmp_path / "both")
    assert ah.Plan.from_pretrained(tmp_path / "both") == plan
    assert ah.Plan.from_pretrained(str(tmp_path / "both/plan.json")) == plan
    assert same(ah.Profile.from_pretrained(tmp_path / "both"), profile)
    (tmp_path / "both/plan.json").unlink()
    with pytest.raises(HubUnavailable, match=r"without plan.json, wanted one that save_pretrained wrote"):
        ah.Plan.from_pretrained(tmp_path / "both")


@pytest.mark.parametrize("measured", [{"a": 1.0}, {"a": {"lpips": "x"}}, [1], "lpips"], ids=str)
def test_metrics_that_are_none(bench, measured, tmp_path):
    with pytest.raises(InputsInvalid, match="wanted metrics by the names of plans"):
        plan_of(bench).save_pretrained(tmp_path / "folder", measured=measured)
    assert [*tmp_path.iterdir()] == []


def test_a_speedup_by_a_profile_on_the_hub(hub, bench, profile):
    profile.push_to_hub(NAME)
    inputs = bench.inputs(steps=STEPS, seed=5)
    with left_as_it_was(bench), ah.speedup(bench.pipe, budget=ah.Budget(transformer_flops=0.6), profile=NAME) as sped:
        given = trace(bench, inputs)
        column = [cell for (cell,) in sped.plan.cells]
    assert 0 < column.count(FULL) < STEPS
    with replayed(bench, column, guided=True):
        assert distance(given, trace(bench, bench.inputs(steps=STEPS, seed=5))) < 1e-9


@pytest.mark.parametrize("wrong", ["org/none", 3, b"x"], ids=str)
def test_a_speedup_by_no_profile(hub, bench, wrong):
    with left_as_it_was(bench), pytest.raises((HubUnavailable, InputsInvalid), match="wanted"):
        ah.speedup(bench.pipe, 2.0, profile=wrong)


def test_a_speedup_by_the_profile_of_another_model(bench, profile):
    other = flux(torch.float32)
    with left_as_it_was(other), pytest.raises(PlanMismatch, match="transformer: plan"):
        ah.speedup(other.pipe, budget=ah.Budget(transformer_flops=0.6), profile=profile)
