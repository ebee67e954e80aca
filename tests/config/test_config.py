"""Loading configs: bases, the model zoo, users' modules, and errors that name file and key."""

import shutil
import sys

import pytest
from detectron2.config import get_cfg

from projects.kd import ConfigError, add_kd_config, load_config
from projects.kd.config import head_node, register_config
from projects.kd.config.defaults import _CONFIG_HOOKS
from projects.kd.errors import DataError, TrainingError, exit_on_user_error
from projects.kd.files import is_zoo_config, resolve_config, zoo_config_folder


@pytest.fixture
def write(tmp_path):
    def write(text, name="config.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Writes an importable module, forgotten afterwards with what it registered."""
    hooks = list(_CONFIG_HOOKS)
    modules = set(sys.modules)
    monkeypatch.syspath_prepend(str(tmp_path))

    def package(name, text):
        (tmp_path / f"{name}.py").write_text(text)

    yield package
    _CONFIG_HOOKS[:] = hooks
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def test_every_key_of_this_project_is_added_to_detectron2s():
    cfg, stock = get_cfg(), get_cfg()
    add_kd_config(cfg)

    def flat(node, prefix=""):
        for key, value in node.items():
            if isinstance(value, type(cfg)):
                yield from flat(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    before, after = dict(flat(stock)), dict(flat(cfg))
    assert {key: after[key] for key in before} == before, "a default of detectron2 changed"
    assert {
        "KD.HEADS",
        "KD.TEACHER.CONFIG_FILE",
        "SOLVER.EMA.DECAY",
    } <= after.keys() - before.keys()
    assert cfg.KD.META_ARCHITECTURE == "" and cfg.KD.HEADS == ()


def test_values_bases_and_overrides(write):
    write("SOLVER: {BASE_LR: 0.5, MAX_ITER: 7}\nKD: {HEADS: ['CWD'], WARMUP_ITERS: 3}", "base.yaml")
    path = write("_BASE_: base.yaml\nSOLVER: {MAX_ITER: 8}\nKD:\n  HEADS: ('FGFI',)")
    cfg = load_config(path, ["KD.WARMUP_ITERS", "4", "KD.LEVELS", "('p3',)"])
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER) == (0.5, 8)
    assert tuple(cfg.KD.HEADS) == ("FGFI",)
    assert cfg.KD.WARMUP_ITERS == 4 and cfg.KD.LEVELS == ("p3",)
    cfg.SOLVER.MAX_ITER = 9  # not frozen


def test_stock_zoo_configs_by_name_and_as_base(write):
    zoo = load_config("model_zoo://COCO-Detection/retinanet_R_101_FPN_3x.yaml")
    assert zoo.MODEL.META_ARCHITECTURE == "RetinaNet" and zoo.MODEL.RESNETS.DEPTH == 101
    # Base-RetinaNet.yaml computes its anchor sizes with a Python tag
    assert zoo.MODEL.ANCHOR_GENERATOR.SIZES[0][0] == 32
    own = load_config(
        write(
            '_BASE_: "model_zoo://COCO-Detection/retinanet_R_50_FPN_1x.yaml"\n'
            "MODEL: {RESNETS: {DEPTH: 18}}"
        )
    )
    assert own.MODEL.RESNETS.DEPTH == 18
    assert own.MODEL.ANCHOR_GENERATOR.SIZES == zoo.MODEL.ANCHOR_GENERATOR.SIZES


def test_python_tags_run_only_in_the_zoos_own_files(write, tmp_path):
    name = "Base-RetinaNet.yaml"
    shutil.copy(f"{zoo_config_folder()}/{name}", tmp_path / name)
    assert is_zoo_config(str(tmp_path / name))
    cfg = load_config(str(tmp_path / name))
    assert cfg.MODEL.ANCHOR_GENERATOR.SIZES[0][0] == 32
    with open(tmp_path / name, "a") as file:
        file.write("# one more line\n")
    assert not is_zoo_config(str(tmp_path / name))
    with pytest.raises(ConfigError, match=r"Base-RetinaNet\.yaml: holds Python tags"):
        load_config(str(tmp_path / name))
    # nor through a base
    with pytest.raises(ConfigError, match="holds Python tags"):
        load_config(write(f"_BASE_: {name}"))
    # nor any other code
    flag = tmp_path / "ran"
    evil = write(f"OUTPUT_DIR: !!python/object/apply:os.mkdir ['{flag}']", "evil.yaml")
    with pytest.raises(ConfigError, match=r"evil\.yaml: holds Python tags"):
        load_config(evil)
    assert not flag.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("KD: {WARMPU_ITERS: 3}", r"KD\.WARMPU_ITERS"),
        ("KD: {FGFI: {WEIGTH: 3}}", r"KD\.FGFI\.WEIGTH"),
        ("MODEL: {BACKBONES: 3}", r"MODEL\.BACKBONES"),
        ("SOLVER: {MAX_ITER: many}", r"many.*SOLVER\.MAX_ITER"),
        ("KD: 3", "KD"),
        ("VERSION: 1", "VERSION 1"),
        ("SOLVER: {MAX_ITER: [", "cannot be read as YAML"),
        ("- a\n- b", "cannot be read as a YAML config"),
        ("just text", "cannot be read as a YAML config"),
        ("", "cannot be read as a YAML config"),
        ("_BASE_: nowhere.yaml", r"nowhere\.yaml"),
        ("_BASE_: model_zoo://nowhere.yaml", r"_BASE_.*nowhere\.yaml"),
    ],
)
def test_what_is_wrong_in_a_file_is_said_in_one_line(write, text, message):
    with pytest.raises(ConfigError, match=message) as error:
        load_config(write(text))
    assert "\n" not in str(error.value)
    if not text.startswith("_BASE_: model_zoo"):
        assert "config.yaml" in str(error.value)


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["KD.WARMPU_ITERS", "3"], r"command line overrides: .*KD\.WARMPU_ITERS"),
        (["SOLVER.MAX_ITER", "many"], r"command line overrides: .*many"),
        (["SOLVER.MAX_ITER"], r"command line overrides: .*pairs"),
        (["KD.IMPORTS", "my_module"], r"KD\.IMPORTS is my_module"),
        (["KD.IMPORTS", "(1,)"], r"KD\.IMPORTS is \(1,\)"),
    ],
)
def test_what_is_wrong_in_overrides(write, opts, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write("SOLVER: {MAX_ITER: 3}"), opts)


def test_missing_files():
    with pytest.raises(ConfigError, match=r"--config-file: no such file '/nowhere\.yaml'"):
        load_config("/nowhere.yaml")
    with pytest.raises(ConfigError, match="--config-file is empty"):
        load_config("")
    with pytest.raises(ConfigError, match=r"KD\.X: .*no config 'a/b\.yaml'"):
        resolve_config("model_zoo://a/b.yaml", "KD.X")


@pytest.mark.parametrize(
    "imports",
    ["('{name}',)", "['{name}']", '("{name}",)', "\n    - {name}"],
    ids=["tuple", "list", "double quotes", "yaml list"],
)
def test_modules_are_imported_before_their_keys_are_read(write, package, imports, request):
    name = f"own_module_{request.node.callspec.indices['imports']}"
    package(
        name,
        "from detectron2.config import CfgNode\n"
        "from projects.kd import head_node, register_config\n"
        "@register_config\n"
        "def add_keys(cfg):\n"
        "    cfg.KD.OWN = head_node(weight=2.0, mask_padding=True)\n"
        "    cfg.KD.OWN.EXTRA = 5\n",
    )
    imports = imports.replace("{name}", name)
    cfg = load_config(write(f"KD:\n  IMPORTS: {imports}\n  OWN: {{EXTRA: 6}}"))
    assert cfg.KD.OWN.EXTRA == 6 and cfg.KD.OWN.WEIGHT == 2.0
    assert name in sys.modules


def test_modules_named_in_overrides_or_in_a_base(write, package):
    package("own_module_a", "value = 1")
    package("own_module_b", "value = 1")
    path = write("KD: {IMPORTS: ['own_module_a']}", "base.yaml")
    load_config(path, ["KD.IMPORTS", "('own_module_b',)"])
    assert "own_module_b" in sys.modules and "own_module_a" not in sys.modules
    load_config(write("_BASE_: base.yaml"))
    assert "own_module_a" in sys.modules


def test_a_module_that_cannot_be_imported_is_named(write, package):
    path = write("KD: {IMPORTS: ['no_such_module_of_mine']}")
    with pytest.raises(ConfigError, match=r"KD\.IMPORTS.*'no_such_module_of_mine'.*PYTHONPATH"):
        load_config(path)
    package("own_broken", "1 / 0")
    with pytest.raises(ZeroDivisionError):  # the user's own bug keeps its traceback
        load_config(path, ["KD.IMPORTS", "('own_broken',)"])


def test_a_hook_is_registered_once(package):
    def hook(cfg):
        cfg.KD.TWICE = 1

    before = len(_CONFIG_HOOKS)
    assert register_config(hook) is hook and register_config(hook) is hook
    assert len(_CONFIG_HOOKS) == before + 1


def test_head_node_inherits_the_schedule():
    node = head_node(weight=3.0, mask_padding=False)
    assert (node.WEIGHT, node.LEVELS, node.MASK_PADDING) == (3.0, (), False)
    assert (node.START_ITER, node.WARMUP_ITERS, node.END_ITER) == (-2, -2, -2)


def test_user_errors_end_scripts_in_one_line(capsys):
    for error in (ConfigError("KD.X is\nwrong"), DataError("a.jpg"), TrainingError("NaN")):
        with pytest.raises(SystemExit) as status, exit_on_user_error():
            raise error
        assert status.value.code == 2
        assert capsys.readouterr().err == f"error: {' '.join(str(error).split())}\n"
    with pytest.raises(KeyError), exit_on_user_error():
        raise KeyError("a bug keeps its traceback")


def test_user_errors_of_other_processes_are_found_in_their_text(capsys):
    text = "Traceback:\n  File x\nprojects.kd.errors.DataError: a.jpg: cannot be read\n"
    with pytest.raises(SystemExit), exit_on_user_error():
        raise RuntimeError(text)
    assert capsys.readouterr().err == "error: a.jpg: cannot be read\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("SOLVER: {MAX_ITER: 3}\nSOLVER: {BASE_LR: 0.1}", "line 2: the key SOLVER stands twice"),
        ("_BASE_: config.yaml", r"config\.yaml: _BASE_ 'config.yaml' is based on this file itself"),
        ("_BASE_: 5", "cannot be read as a YAML config"),
        ("SOLVER: {1: 2}", "line 1: the key 1 is no text"),
        ("OUTPUT_DIR:", "OUTPUT_DIR has no value"),
        ("SOLVER:", "SOLVER has no value"),
        ("SOLVER: 3", "SOLVER is 3, but it is a group of keys"),
        ("SOLVER: {MAX_ITR: 3}", r"unknown key SOLVER\.MAX_ITR; did you mean SOLVER\.MAX_ITER"),
        ("SOLVER: {EVAL_PERIOD: 3}", r"SOLVER\.EVAL_PERIOD; did you mean TEST\.EVAL_PERIOD\?"),
        ("KD: {MYHEAD: {WEIGHT: 1.0}}", r"unknown key KD\.MYHEAD"),
        ("OUTPUT_DIR: 2020-01-01", "cannot be read as a YAML config"),
    ],
)
def test_mistakes_that_merging_would_let_pass(write, text, message):
    with pytest.raises(ConfigError, match=message) as error:
        load_config(write(text))
    assert "\n" not in str(error.value)


def test_a_loop_over_several_files_and_other_encodings(write, tmp_path):
    write("_BASE_: b.yaml", "a.yaml")
    with pytest.raises(ConfigError, match=r"c\.yaml.*a\.yaml -> b\.yaml -> c\.yaml -> a\.yaml"):
        write("_BASE_: c.yaml", "b.yaml")
        write("_BASE_: a.yaml", "c.yaml")
        load_config(str(tmp_path / "a.yaml"))
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbfSOLVER: {MAX_ITER: 5}\n")
    assert load_config(str(tmp_path / "bom.yaml")).SOLVER.MAX_ITER == 5
    (tmp_path / "latin.yaml").write_bytes(b"OUTPUT_DIR: \xe9\n")
    with pytest.raises(ConfigError, match="latin.yaml: cannot be read"):
        load_config(str(tmp_path / "latin.yaml"))


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["SOLVER", "3"], "SOLVER is a group of keys"),
        (["SOLVER", "{}"], "SOLVER is a group of keys"),
        (["SOLVER.BASE_LR.X", "3"], "unknown key SOLVER.BASE_LR.X"),
        (["SOLVER.BASE_LR", "None"], "SOLVER.BASE_LR has no value"),
        (["solver.max_iter", "3"], "unknown key solver.max_iter; did you mean SOLVER.MAX_ITER"),
        ([5, 3], "unknown key 5"),
        (["SOLVER.STEPS", "{[]: 1}"], "command line overrides: "),
        (["SOLVER.STEPS", "(" * 300 + ")" * 300], "command line overrides: "),
        (["KD.IMPORTS", "('..',)"], "KD.IMPORTS is"),
        (["KD.IMPORTS", "('',)"], "KD.IMPORTS is"),
    ],
)
def test_overrides_that_merging_would_let_pass(write, opts, message):
    with pytest.raises(ConfigError, match=message) as error:
        load_config(write("SOLVER: {MAX_ITER: 3}"), opts)
    assert "\n" not in str(error.value)


def test_the_one_key_whose_none_means_something(write):
    path = write("SOLVER: {WEIGHT_DECAY_BIAS: null}")
    assert load_config(path).SOLVER.WEIGHT_DECAY_BIAS is None
    opts = ["SOLVER.WEIGHT_DECAY_BIAS", "0.5", "SOLVER.WEIGHT_DECAY_BIAS", "None"]
    assert load_config(path, opts).SOLVER.WEIGHT_DECAY_BIAS is None
