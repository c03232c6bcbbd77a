"""The configuration and the preset files: what they accept, what they refuse, and with which words."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import psa
from psa import presets
from psa.errors import ConfigError, PSAError

ROOT = Path(__file__).parents[1]

# METHOD §6: model, divisors w h t, text, preset, block_n, bounds, mode, rearrange, similarity cap, warm-up steps.
TABLE = """
Wan2.1_14b      16,16,4 0   psa_balanced 128 .4,.5,.6,.8    thresholdbound yes no  15
Wan2.1_1.3b     16,16,4 0   psa_balanced 128 .5,.6,.7,.8    thresholdbound yes yes 15
Wan2.1_1.3b     16,16,4 0   psa_topk     32  .05,.1,.15,.25 topk           yes no  15
Wan2.2_A14B     16,16,4 0   psa_balanced 32  .5,.6,.6,.8    thresholdbound yes no  12
Wan2.2_5B       32,32,4 0   psa_balanced 32  .6,.7,.7,.8    thresholdbound yes no  15
CogVideo1.5_5b  16,16,8 226 psa_balanced 32  .1,.15,.15,.35 topk           yes no  15
CogVideo_5b     16,16,4 226 psa_balanced 128 .1,.15,.15,.35 topk           no  no  15
CogVideo_5b     16,16,4 226 psa_4steps   128 .05,.15,.25,.5 topk           no  no  0
"""


@pytest.mark.parametrize("row", TABLE.strip().splitlines())
def test_every_preset_of_the_method_is_there(row):
    model, divisors, text, preset, block_n, bounds, mode, rearrange, sim, warmup = row.split()
    section = presets.section(model)
    config = section.get(preset)
    assert section.divisors == tuple(map(int, divisors.split(","))) and section.text_length == int(text)
    assert section.default == "psa_balanced" and section.get("baseline").type == "dense"
    assert (config.block_m, config.block_n, config.tile_n) == (128, int(block_n), 32)
    assert [config.mask_ratios[level][1] for level in (1, 2, 4, 8)] == [float(x) for x in bounds.split(",")]
    assert config.mask_mode == mode and config.warmup_steps == int(warmup)
    assert config.use_rearrange == (rearrange == "yes") and config.use_sim_mask == (sim == "yes")
    assert config.tile_size == (2, 8, 8) and config.rearrange_method == "Gilbert"
    assert config.sim_thresholds == {2: 0.7, 4: 0.65, 8: 0.65 if preset == "psa_topk" else 0.6}


def test_the_understanding_preset():
    config = presets.get("qwen2.5-vl")
    assert (config.block_m, config.block_n, config.mask_mode) == (128, 128, "thresholdbound")
    assert [config.mask_ratios[level][1] for level in (1, 2, 4, 8)] == [0.7, 0.8, 0.9, 0.9]
    assert config.importance == "antidiagonal" and config.importance_stride == 8
    assert config.sim_thresholds == {2: 0.75, 4: 0.7, 8: 0.7} and config.use_sim_mask


def test_model_names_map_to_sections():
    for model in presets.SECTIONS:
        assert presets.section(model).presets
    assert presets.get("cogvideo_5b_lora") == presets.get("cogvideo_5b", "psa_4steps")


def test_default_density_of_the_published_setting():
    published = psa.PSAConfig(mask_mode="topk")
    assert presets.explain(published, 1000) == pytest.approx({"uniform": 0.15, "peaked": 0.15}, abs=1e-3)


SEED_EXAMPLE = """
CogVideo_5b:
  attention_configs:
    my_custom_preset:
      type: psa
      description: "我的自定义PSA配置"
      use_rearrange: true
      block_size:
        m: 128
        n: 64
        tile_n: 32
      mask_ratios:
        1: [0.0, 0.5]
        2: [0.5, 0.7]
        4: [0.7, 0.9]
        0: [0.9, 1.0]
      mask_mode: thresholdbound
      warmup_steps: 10
"""


def test_the_seeds_custom_preset_works_as_printed(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "attention_config.yaml").write_text(SEED_EXAMPLE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PSA_CONFIG", raising=False)
    config = presets.get("cogvideo_5b", "my_custom_preset")
    assert config.block_n == 64 and config.warmup_steps == 10 and config.mask_ratios[4] == (0.7, 0.9)
    section = presets.section("cogvideo_5b")
    assert section.text_length == 226 and "psa_balanced" in section.presets  # the rest of the section stays


def test_where_a_users_file_is_found(tmp_path, monkeypatch):
    for name in ("flag", "env", "configs"):
        folder = tmp_path / name
        folder.mkdir()
        text = SEED_EXAMPLE.replace("my_custom_preset", f"from_{name}")
        (folder / "attention_config.yaml").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PSA_CONFIG", str(tmp_path / "env" / "attention_config.yaml"))
    assert "from_flag" in presets.section("cogvideo_5b", tmp_path / "flag" / "attention_config.yaml").presets
    assert "from_env" in presets.section("cogvideo_5b").presets
    monkeypatch.delenv("PSA_CONFIG")
    assert "from_configs" in presets.section("cogvideo_5b").presets
    monkeypatch.setenv("PSA_CONFIG", "nowhere.yaml")
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such file \(\$PSA_CONFIG\)"):
        presets.load()


FAULTS = [
    ("mask_modee: topk", "mask_modee: unknown key; did you mean 'mask_mode'"),
    ("mask_mode: top", "mask_mode: 'top' is unknown; did you mean 'topk'"),
    ("mask_ratios: {1: [0.0, 0.5], 2: [0.4, 0.7]}", "overlaps the one before"),
    ("mask_ratios: {1: [0.0, 0.5], 2: [0.6, 0.7]}", "leaves a gap"),
    ("mask_ratios: {2: [0.0, 0.5], 1: [0.5, 0.7]}", "finer than level 2"),
    ("mask_ratios: {1: [0.5, 0.4]}", "not an interval"),
    ("mask_ratios: {3: [0.0, 0.4]}", "level must be 0 or a power of two"),
    ("mask_ratios: {64: [0.0, 0.4]}\n      block_size: {n: 32}", "power of two up to 32"),
    ("mask_ratios: {1: [0.0, 1.4]}", "not an interval within [0, 1]"),
    ("mask_ratios: {1: [0.0, .nan]}", "not a finite number"),
    ("block_size: {m: 128, n: 64, tile_n: 48}", "tile_n: 48 does not divide block_n = 64"),
    ("block_size: {m: 100}", "block_m: 100 is not a power of two"),
    ("block_size: {n: 64, tilen: 32}", "did you mean 'tile_n'"),
    ("sim_thresholds: {x3: 0.5}", "unknown key"),
    ("tile_size: [2, 8]", "tile_size"),
    ("rearrange_method: gilbrt", "did you mean 'Gilbert'"),
    ("density: 0.15\n      mask_ratios: {1: [0.0, 0.4]}", "mask_ratios: auto mode has no use"),
    ("warmup_steps: -1", "warmup_steps: -1 is not a whole number"),
    ("use_rearrange: maybe", "use_rearrange: 'maybe' is not true or false"),
    ("type: sparse", "type: 'sparse' is unknown"),
]


@pytest.mark.parametrize(("line", "message"), FAULTS)
def test_a_fault_is_one_line_naming_file_model_and_preset(tmp_path, line, message):
    file = tmp_path / "mine.yaml"
    file.write_text(f"Wan2.1_14b:\n  attention_configs:\n    broken:\n      {line}\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        presets.load(file)
    text = str(caught.value)
    assert message in text and "\n" not in text
    assert text.startswith(f"{file}: Wan2.1_14b: broken: ")


def test_a_missing_preset_or_model_names_the_nearest():
    with pytest.raises(ConfigError, match=r"attention_config\.yaml: Wan2\.1_1\.3b: preset 'psa_top'.*'psa_topk'"):
        presets.get("wan21_1.3b", "psa_top")
    with pytest.raises(ConfigError, match=r"model 'wan21_1\.3' has no presets.*'wan21_1\.3b'"):
        presets.get("wan21_1.3")


def test_a_preset_by_section_and_by_default():
    assert presets.get("wan21_14b", "Wan2.1_1.3b/psa_topk") == presets.get("wan21_1.3b", "psa_topk")
    assert presets.get("wan21_1.3b", "default") == presets.get("wan21_1.3b") == presets.get("", "wan21_1.3b/default")
    assert presets.get("cogvideo_5b_lora", "default") == presets.get("cogvideo_5b", "psa_4steps")


def test_a_density_of_dense_attention_is_refused():
    dense = presets.get("wan21_1.3b", "baseline")
    with pytest.raises(ConfigError, match=r"density: 0\.3 was asked of dense attention"):
        dense.replace(density=0.3)
    assert dense.replace(type="psa", density=0.3).density == 0.3


def test_old_files_with_attn_impl_are_read_with_one_notice(tmp_path):
    from psa.config import _notice_attn_impl

    _notice_attn_impl.cache_clear()
    with pytest.warns(UserWarning, match="attn_impl is ignored") as caught:
        for _ in range(3):
            assert psa.PSAConfig.from_dict({"attn_impl": "new_mask_type"}) == psa.PSAConfig()
    assert len(caught) == 1


def test_a_config_survives_its_own_dict_pickling_and_copying():
    configs = [c for section in presets.load().values() for c in section.presets.values()]
    configs += [psa.PSAConfig(density=0.2, bias="measured", exponent=2.0, keep_all=False, tile_size=(4, 4, 4))]
    for config in configs:
        assert psa.PSAConfig.from_dict(config.to_dict()) == config
        assert psa.PSAConfig.from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config
        assert psa.PSAConfig.from_key(config.key) == config
        assert pickle.loads(pickle.dumps(config)) == config and copy.deepcopy(config) == config
        assert hash(copy.copy(config)) == hash(config)


def test_replace_switches_modes_as_asked():
    base = presets.get("wan21_14b")
    changed = base.replace(density=0.2)
    assert (changed.mask_mode, changed.mask_ratios, changed.warmup_steps) == ("auto", None, 15)
    assert base.mask_mode == "thresholdbound"
    assert changed.replace(tau=0.1).density is None and changed.replace(mask_mode="topk").density is None
    assert base.replace(bias="variance").bias_cap == 1.0 and base.replace(block_n=16).tile_n == 16


def test_replace_leaves_behind_what_the_new_mode_has_no_use_for():
    auto = psa.PSAConfig(target_error=0.1, max_density=0.5, probe_rows=64, probe_every=3)
    assert auto.replace(density=0.2).max_density == 1.0 and auto.replace(density=0.2).probe_rows == 64
    assert auto.replace(mask_mode="topk") == psa.PSAConfig(mask_mode="topk")
    ranked = psa.PSAConfig(density=0.2, rank_exponent=3.0, share_heads=True)
    assert ranked.mask_mode == "proportional" and ranked.replace(target_error=0.1).rank_exponent == 0.0
    assert ranked.replace(tau=0.1).share_heads is False


def test_the_similarity_cap_stays_behind_with_the_published_mode_it_belongs_to():
    """Where nothing is dropped, it would keep more than the density asked for."""
    base = presets.get("wan21_1.3b")
    assert base.use_sim_mask and base.replace(block_m=64).use_sim_mask
    assert not base.replace(density=0.2).use_sim_mask and not base.replace(target_error=0.1).use_sim_mask
    assert base.replace(density=0.2, use_sim_mask=True).use_sim_mask
    capped = psa.PSAConfig(mask_mode="proportional", use_sim_mask=True)
    assert capped.replace(density=0.2).use_sim_mask, "given beside a density, it is meant"


UNUSED = [
    *({"mask_mode": "auto", name: value} for name, value in (
        ("rank_exponent", 3.0), ("exponent", 2.0), ("keep_all", False), ("tau", 0.1), ("bias", "variance"),
        ("bias_cap", 1.0), ("mask_ratios", {1: (0.0, 0.5), 0: (0.5, 1.0)}), ("max_density", 0.5),
    )),
    *({"mask_mode": mode, name: value} for mode in ("topk", "thresholdbound") for name, value in (
        ("rank_exponent", 3.0), ("exponent", 2.0), ("keep_all", False), ("share_heads", True), ("tau", 0.1),
        ("density", 0.2), ("probe_rows", 9), ("probe_every", 9), ("probe_drift", 0.9), ("target_error", 0.1),
        ("max_density", 0.5), ("bias_cap", 1.0),
    )),
    *({"mask_mode": "proportional", name: value} for name, value in (
        ("probe_rows", 9), ("probe_every", 9), ("probe_drift", 0.9), ("target_error", 0.1), ("max_density", 0.5),
        ("bias_cap", 1.0), ("mask_ratios", {1: (0.0, 0.5), 0: (0.5, 1.0)}),
    )),
    {"tau": 0.1, "share_heads": True},
]  # fmt: skip


@pytest.mark.parametrize("settings", UNUSED, ids=str)
def test_a_field_that_the_mode_has_no_use_for_is_refused_by_name(settings):
    with pytest.raises(ConfigError, match="|".join(settings.keys() - {"mask_mode"})):
        psa.PSAConfig(**settings)


@pytest.mark.parametrize(
    "arguments",
    [
        {"density": 0.0}, {"density": float("nan")}, {"density": True}, {"density": "0.1"}, {"density": 0.001},
        {"tau": -1.0}, {"tau": 0.0}, {"density": 0.2, "tau": 0.1}, {"mask_mode": "topk", "density": 0.2},
        {"exponent": -1.0}, {"bias": "none"}, {"bias_cap": float("inf")}, {"importance": "magic"},
        {"importance_rows": 3}, {"importance_rows": 256}, {"importance_cols": 128}, {"seed": -1}, {"seed": 0.5},
        {"block_n": 8}, {"block_n": 64.0}, {"tile_n": 0}, {"tile_size": (0, 8, 8)}, {"mask_ratios": {}},
        {"importance": "antidiagonal", "importance_stride": 128}, {"description": 3},
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(arguments):
    with pytest.raises(ConfigError):
        psa.PSAConfig(**arguments)


SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-3, 200), st.floats(), st.text(max_size=6))
VALUES = st.recursive(
    SCALARS, lambda x: st.lists(x, max_size=3) | st.dictionaries(SCALARS, x, max_size=4), max_leaves=6
)
KEYS = st.sampled_from(
    ["type", "block_size", "mask_ratios", "mask_mode", "density", "tau", "exponent", "sim_thresholds", "tile_size",
     "importance", "bias", "bias_cap", "seed", "warmup_steps", "attn_impl", "default_attention", "attention_configs"]
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.one_of(KEYS, st.text(max_size=4)), VALUES, max_size=5))
def test_any_dict_is_a_config_or_a_psa_error(preset):
    try:
        config = psa.PSAConfig.from_dict(preset)
    except PSAError as error:
        assert str(error)
    else:
        assert psa.PSAConfig.from_key(config.key) == config


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.text(max_size=80), st.dictionaries(st.text(max_size=5), VALUES, max_size=3).map(yaml.safe_dump)))
def test_any_file_is_sections_or_a_psa_error(tmp_path_factory, text):
    file = tmp_path_factory.mktemp("yaml") / "any.yaml"
    file.write_text(text, encoding="utf-8")
    try:
        presets.load(file)
    except PSAError as error:
        assert "\n" not in str(error)


def test_bytes_that_are_no_text_are_a_psa_error(tmp_path):
    file = tmp_path / "binary.yaml"
    file.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        presets.load(file)


def test_a_section_lays_over_a_section(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("Wan2.1_14b: {default_attention: baseline}\nMine:\n  attention_configs: {only: {density: 0.2}}\n")
    sections = presets.load(file)
    assert sections["Wan2.1_14b"].default == "baseline" and "psa_balanced" in sections["Wan2.1_14b"].presets
    assert sections["Mine"].get().density == 0.2 and sections["Wan2.2_5B"].divisors == (32, 32, 4)


@pytest.mark.parametrize("explain", [False, True])
def test_the_table_of_presets_fits_80_columns(explain, monkeypatch, capsys):
    from rich.console import Console

    from psa import cli

    monkeypatch.setattr(cli, "out", Console(width=80))
    cli.list_presets(explain=explain)
    said = capsys.readouterr().out
    assert "…" not in said and "psa_balanced*" in said and "thresholdbound" in said


def test_a_preset_with_a_target_error_is_listed_by_error(tmp_path, monkeypatch, capsys):
    from rich.console import Console

    from psa import cli

    file = tmp_path / "mine.yaml"
    file.write_text("Mine:\n  attention_configs: {exact: {target_error: 0.1}, kept: {density: 0.2}}\n")
    monkeypatch.setattr(cli, "out", Console(width=80))
    cli.list_presets("Mine", explain=True, attention_config=file)
    assert capsys.readouterr().out.count("by error") == 2
    cli.list_presets("Mine", attention_config=file, as_json=True)
    described = json.loads(capsys.readouterr().out)["Mine"]
    assert described["exact"]["explained"] == {"uniform": None, "peaked": None}
    assert described["kept"]["explained"]["uniform"] == pytest.approx(0.2, abs=0.01)
