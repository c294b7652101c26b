"""Plans: written and read without loss, checked when they are made, and compared with a pipeline difference by difference."""

import json
import math
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import diffusers
import pytest
from hypothesis import given
from hypothesis import strategies as st
from independent import BOXES, by_head, few, plans

from arrowhead.errors import PlanInvalid, PlanMismatch
from arrowhead.models.model import target_of
from arrowhead.plans.cells import ASC, AST, EXTRAPOLATE, FULL, Arrow, Attend, Cached, Full, Reuse, paper_name, wa_rs
from arrowhead.plans.file_format import SYMBOLS
from arrowhead.plans.layout import Site, Tokens
from arrowhead.plans.plan import Plan
from arrowhead.plans.target import Target

SITES = (Site("blocks.0.attn1", 2, 8, 16), Site("blocks.1.attn1", 4, 8, 32))
TARGET = Target("DiTTransformer2DModel", "DDIMScheduler", {"num_train_timesteps": 1000, "beta_schedule": "linear"}, SITES)
TOKENS = Tokens(64)
PLAN = Plan(((FULL, FULL), (wa_rs(8), AST), (ASC, wa_rs(8, share_cfg=True))), TARGET, TOKENS, guided=True)


def strict_json(text):
    def refuse(literal):
        raise AssertionError(f"{literal} is not JSON")

    return json.loads(text, parse_constant=refuse)


class TestRoundTrip:
    @few
    @given(plan=plans())
    def test_a_plan_comes_back_as_it_was(self, plan, tmp_path_factory):
        path = tmp_path_factory.mktemp("plans") / "plan.json"
        plan.save(path)
        loaded = Plan.load(path)
        assert loaded == plan
        strict_json(path.read_text())

    def test_each_radius_has_its_own_symbol(self, tmp_path):
        row = [wa_rs(8), wa_rs(4), Attend(Arrow(8)), wa_rs(2, share_cfg=True), wa_rs(1), Attend(Arrow(8), share_cfg=True)]
        sites = tuple(Site(f"blocks.{i}", 2, 8, 16) for i in range(len(row)))
        plan = Plan(((FULL,) * len(row), tuple(row)), replace(TARGET, sites=sites), TOKENS, guided=True)
        plan.save(tmp_path / "plan.json")
        content = strict_json((tmp_path / "plan.json").read_text())
        symbols = content["cells"][1].split()
        assert len(set(symbols)) == len(row)
        for symbol, cell in zip(symbols, row, strict=True):
            assert symbol.rstrip("0123456789") == SYMBOLS[paper_name(cell)]
            assert f"arrow:{cell.method.radius}" in content["legend"][symbol]["heads"]
        assert Plan.load(tmp_path / "plan.json") == plan

    def test_heads_are_spelt_one_by_one_where_they_differ(self, tmp_path):
        row = Attend((Full(), Arrow(8))), Attend((Arrow(8, residual=True), Arrow(32), Full(), Cached()), share_cfg=True)
        both = Attend(Cached(), share_cfg=True)
        plan = Plan(((FULL, FULL), row, (Attend((Cached(), Full())), both), (AST, Attend(Cached()))), TARGET, TOKENS, True)
        plan.save(tmp_path / "plan.json")
        content = strict_json((tmp_path / "plan.json").read_text())
        assert content["format"] == 6
        assert content["cells"] == ["F F", "H I", "H2 L", "R K"]
        assert content["legend"] == {
            "F": {"does": "attend", "heads": "full", "share_cfg": False},
            "H": {"does": "attend", "heads": "full arrow:8", "share_cfg": False},
            "I": {"does": "attend", "heads": "arrow:8+residual arrow:32 full cached", "share_cfg": True},
            "H2": {"does": "attend", "heads": "cached full", "share_cfg": False},
            "L": {"does": "attend", "heads": "cached", "share_cfg": True},
            "R": {"does": "reuse"},
            "K": {"does": "attend", "heads": "cached", "share_cfg": False},
        }
        assert Plan.load(tmp_path / "plan.json") == plan

    def test_precisions_are_spelt(self, tmp_path):
        row = Attend((Full("int8"), Arrow(8, True, "int8"))), Attend(Arrow(8, precision="int8"), share_cfg=True)
        last = Attend(Full("int8")), Attend(Full("int8"), share_cfg=True)
        plan = Plan(((FULL, FULL), row, last), TARGET, TOKENS, True)
        plan.save(tmp_path / "plan.json")
        content = strict_json((tmp_path / "plan.json").read_text())
        assert content["cells"] == ["F F", "H b", "f c"]
        words = {symbol: cell["heads"] for symbol, cell in content["legend"].items()}
        assert words == {
            "F": "full",
            "H": "full+int8 arrow:8+residual+int8",
            "b": "arrow:8+int8",
            "f": "full+int8",
            "c": "full+int8",
        }
        assert Plan.load(tmp_path / "plan.json") == plan
        assert plan.count() == {"full": 2, "head-wise": 1, "WA-int8+ASC": 1, "full-int8": 1, "full-int8+ASC": 1}
        assert plan.count_heads() == {"full": 6, "full-int8": 1 + 2 + 4, "WA-RS-int8": 1, "WA-int8": 4}

    @pytest.mark.parametrize("version", [2, 3])
    def test_files_of_formats_2_and_3_are_read(self, tmp_path, version):
        PLAN.save(tmp_path / "plan.json")
        content = strict_json((tmp_path / "plan.json").read_text()) | {"format": version}
        del content["tokens"]["grid"]
        (tmp_path / "plan.json").write_text(json.dumps(content))
        assert Plan.load(tmp_path / "plan.json") == PLAN

    def test_extrapolation_is_spelt(self, tmp_path):
        plan = replace(PLAN, cells=((FULL, FULL), (ASC, FULL), (EXTRAPOLATE, AST), (EXTRAPOLATE, Reuse(0.5))))
        plan.save(tmp_path / "plan.json")
        content = strict_json((tmp_path / "plan.json").read_text())
        assert content["cells"] == ["F F", "C F", "E R", "E E2"]
        assert content["legend"]["E"] == {"does": "extrapolate"}
        assert content["legend"]["E2"] == {"does": "extrapolate", "slope": 0.5}
        assert Plan.load(tmp_path / "plan.json") == plan
        assert plan.count() == {"full": 3, "ASC": 1, "extrapolate": 3, "AST": 1}
        assert plan.count_heads() == {"full": 2 + 4 + 2 + 4, "extrapolate": 2 + 2 + 4, "AST": 4}

    @pytest.mark.parametrize("slope", [0.0, 1.0, 4.5, -5, "0.5", [0.5], [0.5, 5.0]])
    def test_a_slope_is_bounded_or_not_there(self, tmp_path, slope):
        replace(PLAN, cells=((FULL, FULL), (FULL, FULL), (Reuse(0.5), AST))).save(tmp_path / "plan.json")
        content = strict_json((tmp_path / "plan.json").read_text())
        (cell,) = [cell for cell in content["legend"].values() if "slope" in cell]
        cell["slope"] = slope
        (tmp_path / "plan.json").write_text(json.dumps(content))
        with pytest.raises(PlanInvalid, match="slope"):
            Plan.load(tmp_path / "plan.json")

    def test_provenance_comes_back(self, tmp_path):
        about = {"model": "tiny:dit", "search": {"threshold": 0.1, "loss": "paper"}, "seeds": [3, 4]}
        replace(PLAN, about=about).save(tmp_path / "plan.json")
        assert Plan.load(tmp_path / "plan.json").about == about

    @pytest.mark.parametrize(
        "scheduler",
        [
            "DDIMScheduler",
            "DDPMScheduler",
            "DPMSolverMultistepScheduler",
            "FlowMatchEulerDiscreteScheduler",
            "UniPCMultistepScheduler",
        ],
    )
    def test_a_plan_for_a_real_scheduler_is_strict_json_and_comes_back(self, scheduler, tmp_path):
        pipe = SimpleNamespace(scheduler=getattr(diffusers, scheduler)())
        target = target_of(SimpleNamespace(pipe=pipe, family=SimpleNamespace(transformer="Transformer"), sites=SITES))
        assert target.scheduler == scheduler
        assert set(target.scheduler_config) >= {"num_train_timesteps"}
        plan = replace(PLAN, target=target)
        plan.save(tmp_path / "plan.json")
        strict_json((tmp_path / "plan.json").read_text())
        loaded = Plan.load(tmp_path / "plan.json")
        assert loaded == plan
        loaded.require(target)


class TestConstructor:
    @pytest.mark.parametrize("cells", [(), ((),), ((FULL,),), ((FULL, FULL), (FULL,)), ((FULL, FULL), (FULL, FULL, FULL))])
    def test_rows_have_a_cell_for_each_site(self, cells):
        with pytest.raises(PlanInvalid):
            Plan(cells, TARGET, TOKENS, guided=True)

    def test_there_is_a_site(self):
        with pytest.raises(PlanInvalid):
            Plan(((),), replace(TARGET, sites=()), TOKENS, guided=True)

    @pytest.mark.parametrize("cells", [((FULL, AST),), ((FULL, wa_rs(3)),), ((FULL, Attend(Arrow(3))), (FULL, wa_rs(3)))])
    def test_a_cell_that_reads_something_not_computed_is_named_with_its_site(self, cells):
        with pytest.raises(PlanInvalid, match=f"{SITES[1].path}.*step {len(cells) - 1}"):
            Plan(cells, TARGET, TOKENS, guided=True)

    @pytest.mark.parametrize("methods", [(Full(), Arrow(3)), (Full(), Arrow(3), Full()), (*[Full()] * 4, Arrow(3))])
    def test_there_is_a_method_for_each_head(self, methods):
        with pytest.raises(PlanInvalid, match=f"{SITES[1].path} has 4 heads, got methods for {len(methods)}"):
            Plan(((FULL, Attend(methods)),), TARGET, TOKENS, guided=True)

    def test_a_head_that_reads_something_not_computed_is_named(self):
        cells = (FULL, Attend((Full(), Arrow(3), Full(), Full()))), (FULL, Attend((Cached(), *[Arrow(3, residual=True)] * 3)))
        with pytest.raises(PlanInvalid, match=f"{SITES[1].path}: head 1: step 1"):
            Plan(cells, TARGET, TOKENS, guided=True)

    @pytest.mark.parametrize(("guided", "calls"), [(True, 0), (True, 3), (False, 2)])
    def test_a_step_has_one_call_or_with_guidance_two(self, guided, calls):
        with pytest.raises(PlanInvalid, match=f"got {calls} calls"):
            Plan(PLAN.cells, TARGET, TOKENS, guided, calls=calls)

    def test_extrapolation_needs_two_outputs(self):
        cells = ((FULL, FULL), (FULL, FULL), (EXTRAPOLATE, FULL))
        Plan(cells, TARGET, TOKENS, guided=True)
        with pytest.raises(PlanInvalid, match=f"{SITES[0].path}: step 1 extrapolates"):
            Plan((cells[0], *cells[2:]), TARGET, TOKENS, guided=True)

    @pytest.mark.parametrize("slope", [-4.1, 4.01, math.nan, math.inf])
    def test_extrapolate_is_bounded(self, slope):
        with pytest.raises(ValueError, match="wanted a number from -4 to 4"):
            Reuse(slope)

    def test_a_negative_radius_is_refused(self):
        with pytest.raises(ValueError, match="-1"):
            Arrow(-1)

    def test_a_cell_without_heads_is_refused(self):
        with pytest.raises(ValueError, match="one for each head"):
            Attend(())

    @few
    @given(
        method=st.sampled_from([Full(), Cached()]) | st.builds(Arrow, st.integers(0, 9), st.booleans()),
        heads=st.integers(1, 9),
        shared=st.booleans(),
    )
    def test_equal_methods_of_all_heads_become_one_method(self, method, heads, shared):
        each, uniform = Attend((method,) * heads, shared), Attend(method, shared)
        assert each == uniform
        assert hash(each) == hash(uniform)
        assert each.methods(heads) == uniform.methods(heads) == (method,) * heads

    def test_counts(self):
        assert (PLAN.steps, PLAN.samples, replace(PLAN, guided=False).samples) == (3, 2, 1)
        assert PLAN.count() == {"full": 2, "WA-RS": 1, "AST": 1, "ASC": 1, "WA-RS+ASC": 1}
        assert PLAN.count_heads() == {"full": 2 + 4 + 2, "WA-RS": 2 + 4, "AST": 4}

    @few
    @given(plan=plans())
    def test_every_head_of_every_step_is_counted_once(self, plan):
        count = Counter()
        for row in plan.cells:
            for cell, site in zip(row, plan.target.sites, strict=True):
                reuse_name = "extrapolate" if isinstance(cell, Reuse) and cell.extrapolate else "AST"
                methods = [reuse_name] * site.heads if isinstance(cell, Reuse) else by_head(cell, site.heads)
                names = {
                    "AST": "AST",
                    "extrapolate": "extrapolate",
                    Full(): "full",
                    Full("int8"): "full-int8",
                    Cached(): "cached",
                }
                for radius in (*range(21), *BOXES):
                    band = "WA" if isinstance(radius, int) else "box"
                    names |= {Arrow(radius): band, Arrow(radius, True): f"{band}-RS"}
                    names |= {Arrow(radius, False, "int8"): f"{band}-int8", Arrow(radius, True, "int8"): f"{band}-RS-int8"}
                count.update(names[method] for method in methods)
        assert plan.count_heads() == count


class TestMismatch:
    def differences(self, **changed):
        with pytest.raises(PlanMismatch) as error:
            PLAN.require(replace(TARGET, **changed))
        return str(error.value)

    def test_its_own_target_and_call_are_accepted(self):
        PLAN.require(replace(TARGET, scheduler_config=dict(TARGET.scheduler_config)))
        PLAN.require_call(3, Tokens(64), 1)
        PLAN.require_call(3, Tokens(64, 7), 1)  # any text fits
        replace(PLAN, calls=2).require_call(3, Tokens(64), 2)
        replace(PLAN, guided=False).require_call(3, Tokens(64), 2)  # without guidance there is one branch

    def test_another_transformer(self):
        message = self.differences(transformer="FluxTransformer2DModel")
        assert "DiTTransformer2DModel" in message
        assert "FluxTransformer2DModel" in message

    def test_another_scheduler(self):
        message = self.differences(scheduler="DDPMScheduler")
        assert "DDIMScheduler" in message
        assert "DDPMScheduler" in message

    @pytest.mark.parametrize(
        ("config", "words"),
        [
            ({"num_train_timesteps": 500, "beta_schedule": "linear"}, ["num_train_timesteps", "1000", "500"]),
            ({"num_train_timesteps": 1000}, ["beta_schedule", "linear"]),
            ({**TARGET.scheduler_config, "beta_schedule": None}, ["beta_schedule", "linear", "None"]),
        ],
    )
    def test_another_scheduler_setting(self, config, words):
        message = self.differences(scheduler_config=config)
        assert all(word in message for word in words)

    def test_scheduler_settings_that_the_plan_does_not_have_are_ignored(self):
        """Some schedulers change settings while they run; searches leave these out of the plan."""
        extra = replace(TARGET, scheduler_config={**TARGET.scheduler_config, "rescale_betas": True})
        assert extra.common(TARGET) == TARGET.common(extra) == TARGET
        PLAN.require(extra)

    def test_another_number_of_sites(self):
        message = self.differences(sites=(*SITES, Site("blocks.2.attn1", 2, 8, 16)))
        assert "sites" in message
        assert "2" in message
        assert "3" in message

    def test_other_sites(self):
        message = self.differences(sites=(SITES[0], Site("blocks.9.attn1", 4, 8, 32)))
        assert "blocks.1.attn1" in message
        assert "blocks.9.attn1" in message
        assert "blocks.0.attn1" not in message

    def test_the_first_difference_is_said_and_how_many_more_there_are(self):
        other = {"num_train_timesteps": 77, "beta_schedule": "cosine"}
        message = self.differences(transformer="Other", scheduler_config=other, sites=SITES[:1])
        assert message.endswith(f"transformer: plan {TARGET.transformer}, pipeline Other; and 3 more differences")
        all_of_them = TARGET.differences(replace(TARGET, transformer="Other", scheduler_config=other, sites=SITES[:1]))
        assert len(all_of_them) == 4
        assert all(word in str(all_of_them) for word in ["Other", "num_train_timesteps", "77", "cosine", "number of sites"])

    def test_the_message_for_another_model_is_short(self):
        """All sites of a large model differ, in more than one size."""
        inner = [(Site(f"blocks.{i}.attn.inner", 1, 8, 8),) * 9 for i in range(50)]
        mine = tuple(Site(f"blocks.{i}.attn", 4, 8, 32, within=inner[i]) for i in range(50))
        theirs = tuple(replace(site, heads=8, channels=64) for site in mine)
        with pytest.raises(PlanMismatch) as error:
            replace(PLAN, cells=((FULL,) * 50,), target=replace(TARGET, sites=mine)).require(replace(TARGET, sites=theirs))
        assert str(error.value).endswith(". heads of site blocks.0.attn: plan 4, pipeline 8; and 49 more differences")
        assert len(str(error.value)) < 200
        config = {"betas": [0.1] * 1000, "name": "\x1b[31m"}
        (betas, name) = replace(TARGET, scheduler_config=config).differences(replace(TARGET, scheduler_config={}))
        assert len(betas) < 300
        assert name == r"scheduler's name: plan \x1b[31m, pipeline not set"

    @pytest.mark.parametrize(
        ("steps", "tokens", "calls", "words"),
        [
            (5, TOKENS, 1, ["3 steps", "5"]),
            (3, Tokens(256), 1, ["64", "256"]),
            (3, Tokens(64, 7, text_first=True), 1, ["text_first=True"]),
            (3, TOKENS, 2, ["1 calls", "makes 2"]),
            (5, Tokens(256), 2, ["3 steps", "5", "64", "256", "makes 2"]),
        ],
    )
    def test_another_call(self, steps, tokens, calls, words):
        with pytest.raises(PlanMismatch) as error:
            PLAN.require_call(steps, tokens, calls)
        assert all(word in str(error.value) for word in words)
