"""ResNet generators of Keras, in the files that it writes. Their network is written here anew, in plain torch."""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_dataset
from edits import EDITS, FUZZ, edited
from hypothesis import given
from hypothesis import strategies as st

import distill
import export
import utils
from models import GeneratorConfig
from toolkit.checkpoints import RUNS
from toolkit.converters import to_junyanz
from toolkit.weights import load_generator, save_generator
from utils import InputError


def keras_layers(n=2, blocks=1, channels=3, ngf=4):
    """Random layers of a generator: kind, the arrays of its convolution, those of its norm."""
    random = np.random.default_rng(0)
    widths = [ngf * 2**i for i in range(n + 1)]
    shapes = [(7, channels, ngf), *((3, a, 2 * a) for a in widths[:-1]), *(2 * blocks * [(3, widths[-1], widths[-1])])]
    shapes += [*((3, a, 2 * a) for a in reversed(widths[:-1])), (7, ngf, channels)]  # of the transposed ones out, in
    layers = []
    for i, (side, a, b) in enumerate(shapes):
        kind = "conv2d_transpose" if len(shapes) - n - 1 <= i < len(shapes) - 1 else "conv2d"
        kernel = random.normal(0, (2 / side / side / a) ** 0.5, (side, side, a, b)).astype(np.float32)
        out = a if kind == "conv2d_transpose" else b
        scale, shift, bias = random.normal([[1], [0], [0]], 0.3, (3, out)).astype(np.float32)
        is_last = i == len(shapes) - 1
        layers.append((kind, [kernel, bias] if is_last else [kernel], [] if is_last else [scale, shift]))
    return layers


def keras_generator(layers, x, epsilon=1e-3):
    """What TensorFlow computes for (N, C, H, W) whose sides the downsampling divides, in float64.

    At even sizes its strided convolutions pad the end of a row alone; the transposed ones cut off the end.
    """

    def run(layer, x):
        kind, (kernel, *bias), norm = layer
        weight = torch.tensor(kernel).double().permute(3, 2, 0, 1)
        side, _, a, b = kernel.shape
        if kind == "conv2d_transpose":
            x = F.conv_transpose2d(x, weight, stride=2)[..., : 2 * x.shape[2], : 2 * x.shape[3]]
        elif (side, b) == (3, 2 * a):
            x = F.conv2d(F.pad(x, (0, 1, 0, 1)), weight, stride=2)
        else:
            x = F.conv2d(F.pad(x, 4 * [side // 2], mode="reflect"), weight)
        for vector in bias:
            x = x + torch.tensor(vector).double()[:, None, None]
        return F.instance_norm(x, None, None, *torch.tensor(np.array(norm)).double(), eps=epsilon) if norm else x

    first, *inner, last = layers
    x = run(first, x).relu()
    while inner:
        layer = inner.pop(0)
        y = run(layer, x).relu()
        a, b = layer[1][0].shape[2:]
        x = x + run(inner.pop(0), y) if a == b else y
    return torch.tanh(run(last, x))


def assert_same(layers, net, epsilon=1e-3, side=16):
    x = torch.rand(2, net.config.channels, side, side + 8, dtype=torch.float64) * 2 - 1
    expected = keras_generator(layers, x, epsilon)
    assert expected.std() > 0.1
    with torch.no_grad():
        assert (net.double()(x) - expected).abs().max() < 1e-6  # scaled kernels are rounded to float32


# -- the files of Keras -----------------------------------------------------------------------------


def arrays_of(layers):
    return [x for _, conv, norm in layers for x in (*conv, *norm)]


def named(layers):
    """Names and arrays of all layers as Keras numbers them: within their kind."""
    counts = {}
    for kind, conv, norm in layers:
        for layer, arrays in ((kind, conv), ("instance_normalization", norm)):
            if arrays:
                i = counts[layer] = counts.get(layer, -1) + 1
                yield f"{layer}_{i}" if i else layer, arrays


def architecture(layers, epsilon=1e-3, groups=None, kind="GroupNormalization"):
    norms = [
        {"class_name": kind, "config": {"epsilon": epsilon, "groups": groups or len(norm[0])}}
        for *_, norm in layers
        if norm
    ]
    compiled = {"optimizer": {"class_name": "Adam", "config": {"epsilon": 1e-7}}}
    return json.dumps({"config": {"layers": norms}, "compile_config": compiled})


def write_npz(path, layers):
    np.savez(path, *arrays_of(layers))


def write_named_npz(path, layers):
    np.savez_compressed(path, **{f"{name}_{i}": x for name, arrays in named(layers) for i, x in enumerate(arrays)})


def write_keras_2(path, layers, model=None):
    """model: as model.save writes it, with this architecture, else as model.save_weights does."""
    import h5py

    with h5py.File(path, "w") as file:
        root = file.create_group("model_weights") if model else file
        if model:
            file.attrs["model_config"] = model
        found = dict(named(layers))
        root.attrs["layer_names"] = [b"input_1", *(name.encode() for name in found)]
        root.create_group("input_1").attrs["weight_names"] = np.array([])
        for name, arrays in found.items():
            group = root.create_group(name)
            leaves = "kernel:0 bias:0" if "conv" in name else "gamma:0 beta:0"
            group.attrs["weight_names"] = [f"{name}/{leaf}" for leaf in leaves.split()[: len(arrays)]]
            for leaf, x in zip(group.attrs["weight_names"], arrays, strict=True):
                group[leaf] = x


def write_keras_3(path, layers, network=""):
    import h5py

    with h5py.File(path, "a") as file:
        for name, arrays in named(layers):
            for i, x in enumerate(arrays):
                file[f"{network}layers/{name}/vars/{i}"] = x
        file[f"{network}optimizer/vars/0"] = np.ones((7, 7, 3, 4), np.float32)


def write_keras_archive(path, layers, config):
    weights = io.BytesIO()
    write_keras_3(weights, layers)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", config)
        archive.writestr("model.weights.h5", weights.getvalue())


@pytest.mark.parametrize(("n", "blocks", "channels"), [(2, 2, 3), (1, 0, 1), (3, 1, 3)])
def test_arrays_of_a_generator_are_read_exactly(capsys, n, blocks, channels):
    layers = keras_layers(n, blocks, channels)
    write_npz("G_AB.npz", layers)
    net, metadata = load_generator("G_AB.npz")
    assert_same(layers, net)
    expected = {"ngf": 4, "num_residual": blocks, "n_downsampling": n, "channels": channels}
    assert net.config == GeneratorConfig(norm="instance_affine", rotated=True, **expected)
    assert (metadata["direction"], metadata["size"]) == ("AtoB", None)
    assert (
        "G_AB.npz: does not show its norms; read as instance norms with an epsilon of 0.001" in capsys.readouterr().out
    )


def test_biases_before_a_norm_are_read_and_have_no_effect():
    layers = keras_layers()
    for _, conv, norm in layers[:-1]:
        conv.append(np.full(norm[0].shape, 5, np.float32))
    write_npz("G.npz", layers)
    assert_same(layers, load_generator("G.npz")[0])


WRITERS = {
    "named.npz": write_named_npz,
    "keras_2.h5": write_keras_2,
    "keras_3.weights.h5": write_keras_3,
    "model.h5": lambda path, layers: write_keras_2(
        path, layers, architecture(layers, 0.02, kind="InstanceNormalization")
    ),
    "model.keras": lambda path, layers: write_keras_archive(path, layers, architecture(layers, 0.02, groups=-1)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_each_kind_of_file_is_read_exactly_with_the_epsilon_that_it_shows(capsys, name):
    if not name.endswith("npz"):
        pytest.importorskip("h5py")
    layers = keras_layers(blocks=5)  # so that there are ten convolutions of a kind
    WRITERS[name](name, layers)
    net, _ = load_generator(name)
    assert_same(layers, net, 0.02 if name.startswith("model") else 1e-3)
    assert ("does not show its norms" in capsys.readouterr().out) is not name.startswith("model")


# -- what such a network is for ------------------------------------------------------------------------


@pytest.fixture
def keras_file():
    write_npz("G_AB.npz", keras_layers())
    return "G_AB.npz"


def test_hidden_states_and_odd_sizes_are_those_of_the_image_as_it_stands(keras_file):
    net, _ = load_generator(keras_file)
    x = torch.rand(1, 3, 18, 21)
    x[..., 12:] = 0
    with torch.no_grad():
        y, (hidden,) = net(x, return_hidden=True)
        padded = net(F.pad(x, (0, 3, 0, 2), mode="reflect"))
    assert torch.equal(y, padded[..., :18, :21])
    assert hidden.shape == (1, 16, 5, 6)
    assert hidden[..., 4:].std() < hidden[..., :3].std()  # the plain half is on the right


def test_a_generator_of_keras_is_saved_distilled_and_no_file_for_junyanz(tmp_path, no_plots, keras_file):
    teacher, _ = load_generator(keras_file)
    with pytest.raises(InputError, match="rotated True: the junyanz layout cannot hold it"):
        to_junyanz(teacher)
    x = torch.rand(1, 3, 16, 16) * 2 - 1
    save_generator("G.safetensors", teacher, {"direction": "AtoB", "size": [16, 16]})
    assert torch.equal(load_generator("G.safetensors")[0](x), teacher(x))
    make_dataset(tmp_path / "datasets" / "tiny", counts=(2, 2, 1, 1))
    size = "--img_height 16 --img_width 16 --batch_size 2 --precision fp32 --device cpu".split()
    given = ["--dataset_name", "tiny", "--student_residual", "0", "--num_epochs", "1", "--run_name", "student"]
    distill.main(["--teacher", keras_file, *given, *size])
    for name in ("G_AB", "G_BA"):
        assert not load_generator(RUNS / "student" / f"{name}.safetensors")[0].config.rotated


def test_a_student_starts_from_the_turned_kernels():
    write_npz("G.npz", keras_layers(n=0, blocks=0))
    teacher, _ = load_generator("G.npz")
    config = distill.student_config(distill.DistillationConfig(student_residual=0), teacher.config)
    student = distill.make_student(teacher, config, transfer=True)
    x = torch.rand(1, 3, 16, 16)
    assert torch.allclose(student(x), teacher(x), atol=1e-5)


@pytest.mark.slow
def test_an_onnx_file_of_a_generator_of_keras_gives_the_same_images(keras_file):
    onnxruntime = pytest.importorskip("onnxruntime")
    export.main(["--weights", keras_file, "--direction", "AtoB"])
    session = onnxruntime.InferenceSession("G_AB.onnx", providers=["CPUExecutionProvider"])
    x = torch.rand(1, 3, 32, 48) * 2 - 1
    (found,) = session.run(None, {"real_A": x.numpy()})
    assert np.abs(found - keras_generator(keras_layers(), x.double()).numpy()).max() < 1e-4


# -- refusals ------------------------------------------------------------------------------------------


def changed_npz(change):
    def write(path):
        arrays = arrays_of(keras_layers())
        change(arrays)
        np.savez(path, *arrays)

    return write


def two_networks(path):
    write_keras_3(path, keras_layers(), "gen_F/")
    write_keras_3(path, keras_layers(), "gen_G/")


def with_norms(**changes):
    return lambda path: write_keras_archive(path, keras_layers(), architecture(keras_layers(), **changes))


def with_layer(kind, **config):
    """Another layer in the architecture, of which the weights show nothing."""

    def write(path):
        value = json.loads(architecture(keras_layers()))
        value["config"]["layers"].append({"class_name": kind, "config": config})
        write_keras_archive(path, keras_layers(), json.dumps(value))

    return write


@pytest.mark.parametrize(
    ("name", "write", "words"),
    [
        (
            "G.keras",
            with_layer("LeakyReLU", negative_slope=0.2),
            "has the activation LeakyReLU with a slope; expected ReLU",
        ),
        ("G.keras", with_layer("ReLU", negative_slope=0.2), "has the activation ReLU with a slope; expected ReLU"),
        ("G.keras", with_layer("Activation", activation="sigmoid"), "has the activation sigmoid; expected ReLU"),
        (
            "G.keras",
            with_layer("Conv2D", kernel_size=[3, 3], strides=[1, 1], padding="same"),
            "pads with zeros before a convolution of stride 1; expected reflection",
        ),
        (
            "G.npz",
            changed_npz(lambda a: a.pop(1)),
            "22 arrays ((7, 7, 3, 4), (4,), (3, 3, 4, 8), (8,) ...); expected for each",
        ),
        ("G.npz", changed_npz(lambda a: a.insert(1, a[0][0])), "24 arrays ((7, 7, 3, 4), (7, 3, 4), (4,), (4,) ...)"),
        ("G.npz", changed_npz(lambda a: a.pop(0)), "holds one network; expected one ResNet generator"),
        ("G.npz", changed_npz(lambda a: a.__setitem__(3, a[3][..., :5])), "8 kernels ((7, 7, 3, 4), (3, 3, 4, 5), "),
        ("G.npz", changed_npz(lambda a: a.__setitem__(1, a[1][:3])), "stem.2.weight is (3,), expected (4,)"),
        ("G.npz", changed_npz(lambda a: a.__setitem__(1, a[1] / 0)), "stem.2.weight is not finite"),
        (
            "G.npz",
            changed_npz(lambda a: a.__setitem__(0, a[0][:, :, [0, 1]])),
            "stem.1.weight is (4, 2, 7, 7), expected (4, 3",
        ),
        ("G.npz", lambda path: np.savez(path, **{"model.1.weight": np.zeros(3)}), "its arrays have names of PyTorch"),
        ("G.npz", lambda path: np.savez(path, np.array([{}])), "not a readable file of Keras weights (Object arrays"),
        (
            "G.npz",
            lambda path: np.savez_compressed(path, np.zeros((7, 7, 3, 4000))),
            "it would unpack to more than weights do",
        ),
        (
            "G.h5",
            two_networks,
            "holds gen_F, gen_G; expected one ResNet generator, saved alone: generator.save_weights(FILE)",
        ),
        (
            "G.h5",
            lambda path: Path(path).write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(90)),
            "not a readable file of Keras weights",
        ),
        (
            "G.keras",
            with_norms(kind="BatchNormalization"),
            "has a BatchNormalization of epsilon 0.001; expected instance norms",
        ),
        ("G.keras", with_norms(groups=2), "its norms are not instance norms behind each convolution but the last"),
        ("G.keras", with_norms(epsilon=0), "has a GroupNormalization of epsilon 0; expected instance norms"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_other_files_are_refused_in_one_line(name, write, words):
    if not name.endswith("npz"):
        pytest.importorskip("h5py")
    write(name)
    with pytest.raises(InputError) as error:
        load_generator(name)
    assert str(error.value).startswith(f"{name}: ")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def contents(tmp_path_factory):
    """One file of each kind, as bytes by name."""
    pytest.importorskip("h5py")
    folder = tmp_path_factory.mktemp("contents")
    for name, write in WRITERS.items():
        write(folder / name, keras_layers(n=1, blocks=0))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
@FUZZ
@given(edits=EDITS, name=st.sampled_from(sorted(WRITERS)))
def test_damaged_files_are_read_or_refused_in_one_line(tmp_path, contents, edits, name):
    path = tmp_path / name
    path.write_bytes(edited(contents[name], edits))
    line = str(path)
    try:
        load_generator(path)
    except InputError as error:
        line = str(error)
    assert line.startswith(str(path))
    assert "\n" not in line


def test_without_h5py_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setattr(utils.importlib.util, "find_spec", lambda name: None)
    Path("G.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    with pytest.raises(
        InputError, match=r"G.h5: the package h5py is missing; install it with: .*requirements-keras.txt"
    ):
        load_generator("G.h5")


def test_links_of_an_hdf5_file_are_not_followed(tmp_path):
    h5py = pytest.importorskip("h5py")
    write_keras_3("other.h5", keras_layers())
    with h5py.File("G.h5", "w") as file:
        file["layers"] = h5py.ExternalLink("other.h5", "layers")
    with pytest.raises(InputError, match=r"G.h5: holds no layers with weights"):
        load_generator("G.h5")
