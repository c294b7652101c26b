"""Files that something has been done to: what is read is sound by its own checks, or refused in words; nothing else happens."""

import io
import json
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from budget import synthetic
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from independent import plans
from safetensors import safe_open
from safetensors.torch import save_file

import arrowhead as ah
from arrowhead.analysis import arrays
from arrowhead.analysis.arrays import AttentionMap
from arrowhead.errors import InputsInvalid, PlanInvalid
from arrowhead.evaluation.request import captions
from arrowhead.evaluation.results import Cost
from arrowhead.evaluation.work_folder import SettingFolder, open_work, read_image, store_array
from arrowhead.plans import limits
from arrowhead.plans.cells import FULL
from arrowhead.plans.layout import Site, Tokens
from arrowhead.plans.plan import Plan
from arrowhead.plans.target import Target

some = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

ODD = (
    st.none()
    | st.booleans()
    | st.integers(-3, 70)
    | st.sampled_from([10**9, 10**18, -(10**18), 10**30, 2**63, 1e300, -1.5, 1e-320, float("nan"), float("inf"), "x" * 10_000])
    | st.text(max_size=4)
    | st.sampled_from([[], {}, [[]], [1, "a"], {"a": {"b": []}}, "full", "F F", "self_attention", "arrow:99999999999999999999"])
)


def places(value, path=()):
    """Of all that a document holds, by how to get there."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


def at(value, path):
    for key in path:
        value = value[key]
    return value


@st.composite
def mutated(draw, document):
    """One to three changes: something else in a place, a thing left out, one renamed, one said twice, one buried deep."""
    document = json.loads(document)
    for _ in range(draw(st.integers(1, 3))):
        everywhere = [path for path in places(document) if path]
        if not everywhere:
            break
        *path, key = draw(st.sampled_from(everywhere))
        holder = at(document, path)
        how = draw(st.sampled_from(["retype", "delete", "rename", "repeat", "bury"]))
        if how == "retype":
            holder[key] = draw(ODD)
        elif how == "delete":
            del holder[key]
        elif how == "rename" and isinstance(holder, dict):
            holder[draw(st.text(max_size=5))] = holder.pop(key)
        elif how == "repeat" and isinstance(holder, list):
            holder[key:key] = [holder[key]] * draw(st.sampled_from([1, 2, 5000]))
        elif how == "bury":
            for _ in range(draw(st.sampled_from([1, 50]))):
                holder[key] = [holder[key]]
    return json.dumps(document)


ENCODINGS = ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-8-sig", "utf-7", "cp037")


@st.composite
def broken(draw, content):
    """Bytes that are others, missing, more, or in another encoding; NUL bytes; values within values without end."""
    how = draw(st.sampled_from(["bytes", "cut", "encoding", "NUL", "deep", "number", "empty"]))
    if how == "bytes":
        found = bytearray(content)
        for _ in range(draw(st.integers(1, 4))):
            place = draw(st.integers(0, len(found) - 1))
            found[place : place + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
            found += b"x" * (not found)
        return bytes(found)
    if how == "cut":
        return content[: draw(st.integers(0, len(content) - 1))]
    if how == "encoding":
        return content.decode("latin-1").encode(draw(st.sampled_from(ENCODINGS)))
    if how == "NUL":
        place = draw(st.integers(0, len(content)))
        return content[:place] + bytes(draw(st.sampled_from([1, 7, 5000]))) + content[place:]
    if how == "deep":
        depth = draw(st.sampled_from([10, 900, 1000, 100_000]))
        return draw(st.sampled_from([b"[", b'{"a":'])) * depth
    return b"1" * 5000 if how == "number" else b""


def is_sound(plan, tmp_path):
    """It can be counted, written, and read again as it is."""
    plan.flops(), plan.count(), plan.count_heads(), plan.cache_bytes()
    plan.save(tmp_path / "again")
    assert Plan.load(tmp_path / "again") == plan
    assert Plan.load(tmp_path / "again").about == plan.about


def read_or_refused(path, tmp_path):
    try:
        plan = Plan.load(path)
    except PlanInvalid as error:
        said = str(error)
        assert path.name in said
        assert "wanted" in said
        assert len(said) < 3 * limits.MAX_MESSAGE
        return
    is_sound(plan, tmp_path)


class TestPlans:
    @some
    @given(plan=plans(), data=st.data())
    def test_bytes_that_are_others_missing_or_more(self, plan, data, tmp_path):
        content = bytearray(plan.text().encode())
        for _ in range(data.draw(st.integers(1, 4))):
            place = data.draw(st.integers(0, len(content) - 1))
            content[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
        cut = data.draw(st.integers(0, len(content)) | st.just(len(content)))
        (tmp_path / "plan").write_bytes(content[:cut])
        read_or_refused(tmp_path / "plan", tmp_path)

    @some
    @given(plan=plans(), data=st.data())
    def test_values_that_are_others_missing_or_elsewhere(self, plan, data, tmp_path):
        (tmp_path / "plan").write_text(data.draw(mutated(plan.text())))
        read_or_refused(tmp_path / "plan", tmp_path)

    @some
    @given(
        data=st.binary(max_size=40) | st.recursive(ODD, st.lists, max_leaves=4).map(lambda value: json.dumps(value).encode())
    )
    def test_anything_at_all(self, data, tmp_path):
        (tmp_path / "plan").write_bytes(data)
        with pytest.raises(PlanInvalid, match=r"wanted"):
            Plan.load(tmp_path / "plan")

    @some
    @given(plan=plans(), data=st.data())
    def test_other_encodings_and_depths(self, plan, data, tmp_path):
        (tmp_path / "plan").write_bytes(data.draw(broken(plan.text().encode())))
        read_or_refused(tmp_path / "plan", tmp_path)

    @pytest.mark.parametrize("key", ["tokens", "cells", "does", "path", "about"])
    def test_a_key_that_comes_twice(self, key, tmp_path):
        """Readers differ in which one they take."""
        text = sound().text()
        place = text.index(f'"{key}"')
        (tmp_path / "plan").write_text(text[:place] + f'"{key}": 1, ' + text[place:])
        with pytest.raises(PlanInvalid, match=f"'{key}' twice"):
            Plan.load(tmp_path / "plan")

    @pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "1" * 5000])
    def test_numbers_that_json_does_not_have(self, number, tmp_path):
        (tmp_path / "plan").write_text(sound().text().replace('"about": {}', f'"about": {{"threshold": {number}}}'))
        with pytest.raises(PlanInvalid, match="is not JSON"):
            Plan.load(tmp_path / "plan")

    def test_a_folder(self, tmp_path):
        with pytest.raises(PlanInvalid, match=r"got a folder.*wanted a file"):
            Plan.load(tmp_path)

    @pytest.mark.parametrize("path", ["x" * 300, "/dev/null/plan", "a\0b"])
    def test_paths_that_cannot_be_read(self, path):
        with pytest.raises(PlanInvalid, match=r"wanted a file"):
            Plan.load(path)


def sound(steps=2, sites=1, heads=2):
    site = [Site(f"blocks.{i}", heads, 8, 16) for i in range(sites)]
    return Plan(((FULL,) * sites,) * steps, Target("T", "S", {}, tuple(site)), Tokens(64), guided=True)


LARGE = {
    "tokens": lambda c: c["tokens"].update(visual=10**18),
    "text": lambda c: c["tokens"].update(text=10**18),
    "heads": lambda c: c["target"]["sites"][0].update(heads=10**9),
    "heads in many steps": lambda c: (c["target"]["sites"][0].update(heads=2**20), c.update(cells=["F"] * 3)),
    "width": lambda c: c["target"]["sites"][0].update(head_dim=10**12),
    "channels": lambda c: c["target"]["sites"][0].update(channels=2**63),
    "text channels": lambda c: c["target"]["sites"][0].update(text_channels=2**63),
    "weights": lambda c: c["target"]["sites"][0].update(weights=10**18),
    "steps": lambda c: c.update(cells=["F"] * (limits.MAX_STEPS + 1)),
    "sites": lambda c: c["target"].update(sites=c["target"]["sites"] * (limits.MAX_SITES + 1)),
    "sites within": lambda c: c["target"]["sites"][0].update(
        within=[c["target"]["sites"][0] | {"path": "a"}] * limits.MAX_SITES
    ),
}


@pytest.mark.parametrize("change", LARGE.values(), ids=LARGE)
def test_sizes_that_nothing_real_has(change, tmp_path):
    content = json.loads(sound().text())
    change(content)
    (tmp_path / "plan").write_text(json.dumps(content))
    with pytest.raises(PlanInvalid, match=r"got .*wanted \d+ at most"):
        Plan.load(tmp_path / "plan")


def test_a_file_that_is_too_long(tmp_path, monkeypatch):
    plan = sound()
    plan.save(tmp_path / "plan")
    length = len(plan.text())
    monkeypatch.setattr(limits, "MAX_BYTES", length)
    assert Plan.load(tmp_path / "plan") == plan
    (tmp_path / "plan").write_text(plan.text() + " ")
    with pytest.raises(PlanInvalid, match=f"more than {length} bytes"):
        Plan.load(tmp_path / "plan")
    with pytest.raises(PlanInvalid, match=r"wanted .* at most"):  # nor is one written that could not be read
        replace(plan, about={"more": "words"}).save(tmp_path / "longer")
    assert not (tmp_path / "longer").exists()


def test_a_file_without_end_is_not_read_to_it(monkeypatch):
    monkeypatch.setattr(limits, "MAX_BYTES", 1000)
    with pytest.raises(PlanInvalid, match="more than 1000 bytes"):
        Plan.load("/dev/zero")


def test_the_largest_that_is_read_is_read_in_time(tmp_path):
    """As many steps, and as many heads in all steps, as there may be; what takes longer would show as minutes."""
    heads = limits.MAX_HEADS_TIMES_STEPS // limits.MAX_STEPS
    plan = sound(steps=limits.MAX_STEPS, heads=heads)
    plan.save(tmp_path / "plan")
    assert Plan.load(tmp_path / "plan") == plan


@st.composite
def tables(draw):
    return synthetic(draw(st.integers(0, 99)), steps=3, count=2, heads=2, radii=(4,), ages=2, guided=draw(st.booleans()))


class TestTables:
    """More of them in test_budget_files.py."""

    def read_or_refused(self, path):
        try:
            table = ah.Table.load(path)
        except InputsInvalid as error:
            assert "wanted a file that Table.save wrote" in str(error)
            assert len(str(error)) < 3 * limits.MAX_MESSAGE
            return
        try:
            plan = ah.solve(table, ah.Budget(transformer_flops=0.7, granularity="site"))
        except InputsInvalid as error:  # there may be nothing as cheap
            assert "wanted" in str(error)
        else:
            assert plan.steps == table.steps

    @some
    @given(table=tables(), data=st.data())
    def test_a_header_with_changes(self, table, data, tmp_path):
        table.save(tmp_path / "table")
        with safe_open(tmp_path / "table", "pt") as file:
            header, tensors = file.metadata()["arrowhead"], {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        save_file(tensors, tmp_path / "changed", metadata={"arrowhead": data.draw(mutated(header))})
        self.read_or_refused(tmp_path / "changed")

    @some
    @given(table=tables(), data=st.data())
    def test_bytes_that_are_others(self, table, data, tmp_path):
        table.save(tmp_path / "table")
        content = bytearray((tmp_path / "table").read_bytes())
        for _ in range(3):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        (tmp_path / "changed").write_bytes(content)
        self.read_or_refused(tmp_path / "changed")

    @pytest.mark.parametrize(
        "change", [{"tokens": {"visual": 10**18}}, {"radii": [10**30], "tokens": {"visual": 10**12}}], ids=str
    )
    def test_sizes_that_nothing_real_has(self, change, tmp_path):
        synthetic(0, steps=3, radii=(4,)).save(tmp_path / "table")
        with safe_open(tmp_path / "table", "pt") as file:
            header = json.loads(file.metadata()["arrowhead"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = {**header, **change, "tokens": {**header["tokens"], **change["tokens"], "grid": None}}
        save_file(tensors, tmp_path / "changed", metadata={"arrowhead": json.dumps(header)})
        with pytest.raises(InputsInvalid, match=r"got tokens: \d+, wanted \d+ at most"):
            ah.Table.load(tmp_path / "changed")


def analysis(steps=3):
    """Of three heads in two sites."""
    made = np.random.default_rng(0).random
    return ah.Analysis(
        sites=("a", "b"),
        heads=(2, 1),
        steps=steps,
        tokens=Tokens(6),
        guided=True,
        radius=1,
        attention_map=AttentionMap(0, 1, (1,), Tokens(6), made((1, 6, 6), np.float32)),
        reuse_errors=made((4, 3, steps), np.float32),
        step_similarity=made((2, steps, steps), np.float32),
        branch_similarity=made((2, steps), np.float32),
        band_mass=made((3, steps), np.float32),
        text_mass=made((3, steps), np.float32),
        about={"analysis": {"sampled": 512}},
    )


def npy(array, **header):
    """Its bytes, with a header that says something else."""
    stream = io.BytesIO()
    said = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": array.shape}
    np.lib.format.write_array_header_1_0(stream, said | header)
    return stream.getvalue() + array.tobytes()


class TestAnalyses:
    @pytest.fixture
    def saved(self, tmp_path):
        analysis().save(tmp_path / "a.npz")
        return tmp_path / "a.npz"

    def read_or_refused(self, path):
        try:
            found = ah.Analysis.load(path)
        except InputsInvalid as error:
            assert "wanted an npz" in str(error)
            return
        json.dumps(found.as_dict(), allow_nan=False)
        found.save(path)
        assert ah.Analysis.load(path).as_dict() == found.as_dict()

    def rewritten(self, saved, path, **members):
        """The same file with other bytes in some members."""
        with zipfile.ZipFile(saved) as file:
            whole = {member: file.read(member) for member in file.namelist()}
        whole |= {f"{name}.npy": content for name, content in members.items() if content is not None}
        with zipfile.ZipFile(path, "w") as file:
            for name, content in whole.items():
                if members.get(name.removesuffix(".npy"), b"") is not None:
                    file.writestr(name, content)

    def meta(self, saved):
        with np.load(saved) as file:
            return str(file["meta"])

    def test_it_is_sound_before_it_is_changed(self, saved):
        found = ah.Analysis.load(saved)
        assert found.as_dict() == analysis().as_dict()
        np.testing.assert_equal(found.attention_map.weights, analysis().attention_map.weights)

    @some
    @given(data=st.data())
    def test_bytes_that_are_others_or_missing(self, data, saved, tmp_path):
        content = bytearray(saved.read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        cut = data.draw(st.integers(0, len(content)) | st.just(len(content)))
        (tmp_path / "changed").write_bytes(content[:cut])
        self.read_or_refused(tmp_path / "changed")

    @some
    @given(data=st.data())
    def test_numbers_and_words_that_are_others(self, data, saved, tmp_path):
        text = data.draw(mutated(self.meta(saved)))
        self.rewritten(saved, tmp_path / "changed", meta=npy(np.array(text)))
        self.read_or_refused(tmp_path / "changed")

    @pytest.mark.parametrize("shape", [(10**12,), (10**9, 10**9), (3, 4), (-3, -3), (3,), (0,), ()], ids=str)
    def test_shapes_that_the_bytes_are_not_of(self, shape, saved, tmp_path):
        """Refused before anything is allocated."""
        self.rewritten(saved, tmp_path / "changed", band_mass=npy(np.zeros((3, 3), np.float32), shape=shape))
        with pytest.raises(InputsInvalid, match=r"band_mass.*wanted"):
            ah.Analysis.load(tmp_path / "changed")

    @pytest.mark.parametrize(
        ("name", "array"),
        [
            ("band_mass", np.zeros((3, 3))),
            ("band_mass", np.zeros((3, 3), np.int32)),
            ("band_mass", np.zeros((3, 3), complex)),
            ("attention_map", np.zeros((1, 6, 5), np.float32)),
            ("other", np.zeros(3, np.float32)),
            ("attention_map", None),
            ("meta", None),
        ],
        ids=lambda value: value if isinstance(value, str) else getattr(value, "dtype", "gone"),
    )
    def test_other_arrays(self, name, array, saved, tmp_path):
        self.rewritten(saved, tmp_path / "changed", **{name: None if array is None else npy(array)})
        with pytest.raises(InputsInvalid, match="wanted"):
            ah.Analysis.load(tmp_path / "changed")

    def refused_in_bounds(self, path, match):
        """It takes no more memory than the file has, and a little."""
        assert path.stat().st_size < 2**18
        tracemalloc.start()
        try:
            with pytest.raises(InputsInvalid, match=match):
                ah.Analysis.load(path)
            assert tracemalloc.get_traced_memory()[1] < 2**22
        finally:
            tracemalloc.stop()

    def added(self, saved, name, content, kind=zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(saved, "a") as file:
            file.writestr(zipfile.ZipInfo(name), content, kind)

    def test_a_member_that_no_analysis_has_is_refused_before_it_is_read(self, saved):
        self.added(saved, "evil.npy", npy(np.zeros(2**24, np.float32)))
        self.refused_in_bounds(saved, r"got members \['evil.npy'\], wanted meta.npy, attention_map.npy")

    @pytest.mark.filterwarnings("ignore:Duplicate name")
    def test_a_member_that_comes_twice_is_refused_before_it_is_read(self, saved):
        self.added(saved, "band_mass.npy", npy(np.zeros(2**24, np.float32)))
        self.refused_in_bounds(saved, r"got members \['band_mass.npy'\], wanted .* each once at most")

    def test_members_that_are_too_large_together_are_refused_before_they_are_read(self, saved, tmp_path, monkeypatch):
        large = npy(np.zeros(2**23, np.float32))
        self.rewritten(saved, tmp_path / "plain", band_mass=large, text_mass=large)
        with zipfile.ZipFile(tmp_path / "plain") as plain, zipfile.ZipFile(tmp_path / "changed", "w") as file:
            for member in plain.namelist():
                file.writestr(member, plain.read(member), zipfile.ZIP_DEFLATED)
        monkeypatch.setattr(arrays, "BYTES", len(large) * 3 // 2)
        self.refused_in_bounds(tmp_path / "changed", rf"got \d+ bytes of arrays, wanted {arrays.BYTES} at most")

    def test_no_more_is_decompressed_than_a_member_says_it_has(self, saved, tmp_path):
        self.rewritten(saved, tmp_path / "changed", band_mass=None)
        self.added(tmp_path / "changed", "band_mass.npy", npy(np.zeros(2**24, np.float32)))
        content = (tmp_path / "changed").read_bytes()
        size = struct.pack("<I", len(npy(np.zeros(2**24, np.float32))))
        assert content.count(size) == 2  # in the member's header, and in the list of members
        (tmp_path / "changed").write_bytes(content.replace(size, struct.pack("<I", 200)))
        self.refused_in_bounds(tmp_path / "changed", "wanted")

    @pytest.mark.parametrize("kind", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    def test_compression_that_is_not_read_in_bounds(self, kind, saved, tmp_path):
        self.rewritten(saved, tmp_path / "changed", band_mass=None)
        self.added(tmp_path / "changed", "band_mass.npy", npy(np.zeros(2**22, np.float32)), kind)
        self.refused_in_bounds(tmp_path / "changed", "wanted deflate or none")

    def test_an_encrypted_member(self, saved):
        content = saved.read_bytes()
        place = content.rindex(b"PK\x01\x02") + 8
        saved.write_bytes(content[:place] + bytes([content[place] | 1]) + content[place + 1 :])
        with pytest.raises(InputsInvalid, match=r"encrypted.*wanted an npz"):
            ah.Analysis.load(saved)

    @pytest.mark.parametrize("path", ["/dev/zero", "/", "nowhere", "a\0b", "x" * 300])
    def test_paths_that_are_no_files(self, path):
        with pytest.raises(InputsInvalid, match="wanted an npz"):
            ah.Analysis.load(path)

    def test_objects_are_not_unpickled(self, saved, tmp_path):
        stream = io.BytesIO()
        np.save(stream, np.array([Pickled()]), allow_pickle=True)
        self.rewritten(saved, tmp_path / "changed", band_mass=stream.getvalue())
        with pytest.raises(InputsInvalid, match="band_mass"):
            ah.Analysis.load(tmp_path / "changed")

    @pytest.mark.parametrize(
        "change",
        [
            {"attention_map": AttentionMap(2, 1, (0,), Tokens(6), np.zeros((1, 6, 6), np.float32))},
            {"attention_map": AttentionMap(0, 3, (0,), Tokens(6), np.zeros((1, 6, 6), np.float32))},
            {"attention_map": AttentionMap(1, 0, (1,), Tokens(6), np.zeros((1, 6, 6), np.float32))},
            {"radius": -1},
            {"sites": ("a",)},
            {"heads": (3, 0)},
        ],
        ids=", ".join,
    )
    def test_numbers_that_mean_nothing(self, change):
        with pytest.raises(InputsInvalid, match=r"got .*wanted"):
            replace(analysis(), **change)


IMAGES = range(4, 6)
RECORD = {
    "seconds": 1.5,
    "session": "7-9",
    "peak_memory_bytes": None,
    "threads": 1,
    "summary": {"kernel": "chunked", "flops": {"attention": 0.5, "module": 0.75}, "peak_cache_bytes": 7, "notes": []},
    "frames": 2,
}


class TestWorkFolders:
    """Two images of two frames each, and their values."""

    @pytest.fixture
    def setting(self, tmp_path):
        found = SettingFolder("raw", None, tmp_path)
        found.store(IMAGES, torch.arange(4 * 6 * 5 * 3, dtype=torch.uint8).reshape(2, 2, 6, 5, 3), RECORD)
        store_array(found.value_path("psnr", IMAGES), torch.ones(4, 3))
        return found

    def test_it_is_sound_before_it_is_changed(self, setting):
        assert setting.record(IMAGES) == RECORD
        assert setting.pixels(IMAGES).flatten()[:3].tolist() == [0, 3, 6]
        assert torch.equal(setting.values("psnr", [IMAGES], 2, 3), torch.ones(4, 3))

    @some
    @given(data=st.data())
    def test_a_record(self, data, setting):
        path, text = setting.record_path(IMAGES), json.dumps(RECORD)
        path.write_bytes(data.draw(mutated(text).map(str.encode) | broken(text.encode())))
        try:
            cost = Cost.of(setting, setting, [IMAGES])
        except InputsInvalid as error:
            assert str(error).startswith(f"cannot read {path}: ")
            assert str(error).endswith("; delete it, and run again: it is made anew")
            assert len(str(error)) < 2 * limits.MAX_MESSAGE
        else:
            json.dumps(cost.summary, allow_nan=False)
            assert cost.seconds_per_image > 0

    @pytest.mark.parametrize("length", [0, 1, 40, 150])
    def test_a_record_that_is_cut_short(self, length, setting):
        path = setting.record_path(IMAGES)
        path.write_bytes(path.read_bytes()[:length])
        for read in (setting.record, setting.pixels):
            with pytest.raises(InputsInvalid, match=rf"cannot read {path}.*delete .*, and run again"):
                read(IMAGES)

    @some
    @given(data=st.data())
    def test_values(self, data, setting):
        path = setting.value_path("psnr", IMAGES)
        store_array(path, torch.ones(4, 3))
        path.write_bytes(data.draw(broken(path.read_bytes())))
        self.values_or_refused(setting)

    @some
    @given(
        data=st.data(),
        shape=st.lists(st.integers(-2, 5), max_size=3),
        dtype=st.sampled_from(["<f4", "<f8", "<i4", "<U3", "|O"]),
    )
    def test_arrays_of_other_shapes_and_types(self, data, shape, dtype, setting):
        said = st.sampled_from([shape, [4, 3], [10**12], [10**9, 10**9], [3, 4]])
        array = np.zeros(12, "<f4")
        setting.value_path("psnr", IMAGES).write_bytes(npy(array, shape=tuple(data.draw(said)), descr=dtype))
        self.values_or_refused(setting)

    def values_or_refused(self, setting):
        try:
            found = setting.values("psnr", [IMAGES], 2, 3)
        except InputsInvalid as error:
            assert str(error).startswith(f"cannot read {setting.value_path('psnr', IMAGES)}: ")
            assert str(error).endswith("; delete it, and run again: it is made anew")
            assert len(str(error)) < 2 * limits.MAX_MESSAGE
        else:
            assert found.shape == (4, 3)
            assert found.isfinite().all()

    @some
    @given(data=st.data())
    def test_a_picture(self, data, setting):
        path = setting.folder / "images/000004-001.png"
        setting.store(IMAGES, torch.zeros(2, 2, 6, 5, 3, dtype=torch.uint8), RECORD)
        path.write_bytes(data.draw(broken(path.read_bytes())))
        try:
            assert setting.pixels(IMAGES).shape == (4, 3, 6, 5)
        except InputsInvalid as error:
            assert "run again: the batch is made anew" in str(error)

    def test_a_picture_of_a_format_that_runs_programs_is_not_opened(self, tmp_path):
        """Pillow runs Ghostscript for this one."""
        (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n")
        with pytest.raises(InputsInvalid, match=r"cannot read the image .*a\.png: cannot identify"):
            read_image(tmp_path / "a.png")

    @some
    @given(data=st.data())
    def test_a_manifest(self, data, tmp_path):
        about = {"inputs": {"steps": 3}, "per_image": {"prompt": ["a", "b"]}, "seed": 0}
        text = json.dumps(about)
        (tmp_path / "evaluation.json").write_bytes(data.draw(mutated(text).map(str.encode) | broken(text.encode())))
        try:
            open_work(tmp_path, about)
        except InputsInvalid as error:
            assert "take another folder" in str(error)
            assert len(str(error)) < 2 * limits.MAX_MESSAGE
        else:
            assert json.loads((tmp_path / "evaluation.json").read_bytes()) == about


COCO = {
    "images": [{"id": 7}, {"id": 8}],
    "annotations": [{"id": i, "image_id": 7 + i % 2, "caption": "a cat"} for i in range(4)],
}


class TestCaptions:
    def read_or_refused(self, path):
        try:
            found = captions(path)
        except InputsInvalid as error:
            assert path.name in str(error)
            assert "wanted" in str(error)
            assert len(str(error)) < 2 * limits.MAX_MESSAGE
        else:
            assert found
            assert all(caption.strip() == caption != "" and "\0" not in caption for caption in found)
            json.dumps(found, ensure_ascii=False).encode()

    @some
    @given(data=st.data())
    def test_of_coco(self, data, tmp_path):
        text = json.dumps(COCO)
        (tmp_path / "c.json").write_bytes(data.draw(mutated(text).map(str.encode) | broken(text.encode())))
        self.read_or_refused(tmp_path / "c.json")

    @some
    @given(content=st.binary(max_size=30) | broken("a cat\na dög\n".encode("latin-1")) | broken("a cat\na dög\n".encode()))
    def test_of_text(self, content, tmp_path):
        (tmp_path / "c.txt").write_bytes(content)
        self.read_or_refused(tmp_path / "c.txt")

    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
    @pytest.mark.parametrize("name", ["c.txt", "c.json"])
    def test_a_byte_order_mark_is_no_word(self, name, encoding, tmp_path):
        (tmp_path / name).write_text("a cat\na cat" if name == "c.txt" else json.dumps(COCO), encoding=encoding)
        assert captions(tmp_path / name) == ["a cat"] * 2

    @pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32-be", "latin-1"])
    def test_another_encoding(self, encoding, tmp_path):
        """In UTF-16 without a mark, ASCII is UTF-8 with NUL characters."""
        (tmp_path / "c.txt").write_text("a cat\na dog\n" + "ö" * (encoding == "latin-1"), encoding=encoding)
        with pytest.raises(InputsInvalid, match=r"cannot read captions from .*wanted a text file in UTF-8"):
            captions(tmp_path / "c.txt")

    def test_half_of_a_surrogate_pair(self, tmp_path):
        """JSON can say it; no tokenizer can take it."""
        (tmp_path / "c.json").write_text(json.dumps(COCO).replace("a cat", "a cat \\ud83d", 1))
        with pytest.raises(InputsInvalid, match=r"half of a surrogate pair"):
            captions(tmp_path / "c.json")


class Pickled:
    """Whoever unpickles it notices."""

    def __reduce__(self):
        return exec, ("raise SystemExit('unpickled')",)


WATCHED = """
import json, sys
import arrowhead as ah
kind, path = sys.argv[1:]
load = {"plan": ah.Plan.load, "table": ah.Table.load, "analysis": ah.Analysis.load}[kind]
load(path)  # once beforehand: what is imported when it first runs is none of the file's doing
seen, watching = [], True
def watch(event, args):
    if watching and event.split(".")[0] in {"open", "exec", "compile", "import", "subprocess", "os", "socket", "pickle",
                                            "ctypes", "shutil", "glob", "tempfile", "urllib", "marshal"}:
        seen.append((event, str(args[0]) if args else ""))
sys.addaudithook(watch)
load(path)
watching = False
print(json.dumps(seen))
"""


@pytest.mark.parametrize("kind", ["plan", "table", "analysis"])
def test_reading_opens_one_file_and_runs_nothing(kind, tmp_path):
    """By the interpreter's own audit events; words in the file that name files and code stay words."""
    path, words = (
        tmp_path / "file",
        {"model": "/etc/hostname", "search": {"strategy": "__import__('os').system('id')"}, "url": "http://localhost"},
    )
    made = {"plan": sound(), "table": synthetic(0, steps=3), "analysis": analysis()}[kind]
    replace(made, about=words).save(path)
    done = subprocess.run([sys.executable, "-c", WATCHED, kind, path], capture_output=True, text=True, check=True)
    seen = json.loads(done.stdout.splitlines()[-1])
    assert {what for event, what in seen if event == "open"} <= {str(path)}
    parsed = {"compile"} if kind == "analysis" else set()  # an array's header is a literal, which numpy parses
    assert {event for event, _ in seen} <= {"open"} | parsed, seen
