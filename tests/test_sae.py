"""The sparse autoencoder itself: SAELens' formulas, SAELens' files, and its edits inside a model."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from mlx_hooks import HookedModel, HookError
from mlx_hooks.analysis.sae.autoencoder import SparseAutoencoder

D_IN, D_SAE = 6, 10
WEIGHTS = "sae_weights.safetensors"


def arrays(seed: int = 0, d_in: int = D_IN, d_sae: int = D_SAE) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    shapes = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def make(
    architecture: str = "relu", *, dtype: mx.Dtype = mx.float32, seed: int = 0, **fields: Any
) -> SparseAutoencoder:
    weights = {name: mx.array(array).astype(dtype) for name, array in arrays(seed).items()}
    if architecture == "topk":
        fields.setdefault("k", 3)
    if architecture == "jumprelu":
        weights["threshold"] = mx.array(np.linspace(-0.5, 1.5, D_SAE).astype(np.float32)).astype(dtype)
    return SparseAutoencoder(architecture, **weights, **fields)


def rows(*shape: int, seed: int = 1) -> np.ndarray:
    return (2 * np.random.default_rng(seed).standard_normal((*shape, D_IN)) + 0.5).astype(np.float32)


def saelens(sae: SparseAutoencoder, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Activations and reconstruction as SAELens 6 defines them, in NumPy float64."""
    w = {
        name: np.array(getattr(sae, name).astype(mx.float32), np.float64)
        for name in ("W_enc", "b_enc", "W_dec", "b_dec")
    }
    x = x.astype(np.float64)
    added, factor = 0.0, 1.0
    if sae.normalize_activations == "constant_norm_rescale":
        coefficient = x.shape[-1] ** 0.5 / np.linalg.norm(x, axis=-1, keepdims=True)
        x, factor = x * coefficient, 1 / coefficient
    elif sae.normalize_activations == "layer_norm":
        added = x.mean(axis=-1, keepdims=True)
        # torch's std has n - 1 degrees of freedom.
        factor = (x - added).std(axis=-1, keepdims=True, ddof=1)
        x = (x - added) / (factor + 1e-5)
    hidden = (x - w["b_dec"] * sae.apply_b_dec_to_input) @ w["W_enc"] + w["b_enc"]
    norms = np.linalg.norm(w["W_dec"], axis=-1)
    if sae.architecture == "topk":
        hidden = hidden * norms if sae.rescale_acts_by_decoder_norm else hidden
        features = np.zeros_like(hidden)
        chosen = np.argsort(hidden, axis=-1)[..., -sae.k :]
        np.put_along_axis(features, chosen, np.maximum(np.take_along_axis(hidden, chosen, -1), 0), -1)
    else:
        features = np.maximum(hidden, 0)
        if sae.architecture == "jumprelu":
            features = features * (hidden > np.array(sae.threshold.astype(mx.float32)))
    weighted = features / norms if sae.rescale_acts_by_decoder_norm else features
    return features, (weighted @ w["W_dec"] + w["b_dec"]) * factor + added


VARIANTS = [
    {"architecture": "relu"},
    {"architecture": "relu", "apply_b_dec_to_input": False},
    {"architecture": "topk"},
    {"architecture": "topk", "rescale_acts_by_decoder_norm": True},
    {"architecture": "topk", "k": D_SAE},
    {"architecture": "jumprelu"},
    {"architecture": "jumprelu", "dtype": mx.bfloat16},
    {"architecture": "relu", "normalize_activations": "layer_norm"},
    {"architecture": "jumprelu", "normalize_activations": "constant_norm_rescale"},
    {"architecture": "topk", "normalize_activations": "layer_norm", "apply_b_dec_to_input": False},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_it_computes_what_saelens_computes(variant: dict[str, Any]) -> None:
    sae, x = make(**variant), rows(2, 7)
    features, read = saelens(sae, x)
    np.testing.assert_allclose(np.array(sae.encode(mx.array(x))), features, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.array(sae(mx.array(x))), read, rtol=1e-4, atol=1e-4)
    decoded = sae.decode(mx.array(features.astype(np.float32)), mx.array(x))
    np.testing.assert_allclose(np.array(decoded), read, rtol=1e-4, atol=1e-4)
    assert 0 < (features > 0).mean() < 1


def test_latents_are_independent_of_the_rows_beside_them() -> None:
    x = rows(9)
    for architecture in ("relu", "topk", "jumprelu"):
        sae = make(architecture)
        alone = np.concatenate([np.array(sae.encode(mx.array(row[None]))) for row in x])
        np.testing.assert_allclose(np.array(sae.encode(mx.array(x))), alone, rtol=1e-5, atol=1e-6)


def test_heads_side_by_side_are_one_row() -> None:
    sae = make(reshape_activations="hook_z", metadata={"hook_name": "blocks.0.attn.hook_z"})
    x = rows(2, 5)
    by_head = mx.array(x).reshape(2, 5, 2, 3)
    assert mx.array_equal(sae.encode(by_head), make().encode(mx.array(x)))
    assert sae(by_head).shape == (2, 5, 2, 3)
    assert mx.array_equal(sae(by_head).reshape(2, 5, 6), make()(mx.array(x)))


def test_a_row_of_zeros_has_no_length_and_stays() -> None:
    for normalize in ("constant_norm_rescale", "layer_norm"):
        sae = make(normalize_activations=normalize)
        assert np.array_equal(np.array(sae(mx.zeros((1, D_IN)))), np.zeros((1, D_IN)))


def test_the_parts_of_a_reconstruction_sum_to_it() -> None:
    for normalize in ("none", "layer_norm"):
        sae, x = make("jumprelu", normalize_activations=normalize), mx.array(rows(4))
        parts = sum(np.array(sae.contribution(x, i)) for i in range(D_SAE))
        nothing = np.array(sae.decode(mx.zeros((4, D_SAE)), x))
        np.testing.assert_allclose(parts + nothing, np.array(sae(x)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architecture": "gated"}, "architecture is relu or topk or jumprelu, got 'gated'."),
        ({"architecture": "topk", "k": 11}, "k is a whole number from 1 to 10, the number of latents; got 11."),
        ({"architecture": "topk", "k": 0}, "k is a whole number from 1 to 10"),
        ({"architecture": "topk", "k": 2.5}, "k is a whole number from 1 to 10, the number of latents; got 2.5."),
        ({"k": 2}, "k belongs to topk, and to it alone."),
        ({"threshold": mx.ones(10)}, "A threshold belongs to jumprelu, and to it alone."),
        ({"architecture": "jumprelu", "threshold": mx.ones(3)}, "threshold is (10,) where W_enc is (6, 10), got (3,)."),
        ({"W_dec": mx.ones((6, 10))}, "W_dec is (10, 6) where W_enc is (6, 10), got (6, 10)."),
        ({"b_dec": mx.array([1.0, mx.nan, 1, 1, 1, 1])}, "not finite"),
        ({"b_dec": mx.zeros(6, mx.int32)}, "b_dec holds"),
        ({"normalize_activations": "covariance_whitening"}, "normalize_activations is none or layer_norm or"),
        ({"rescale_acts_by_decoder_norm": True}, "rescale_acts_by_decoder_norm belongs to topk."),
    ],
)
def test_what_does_not_fit_is_one_sentence(fields: dict[str, Any], message: str) -> None:
    weights = {name: mx.array(array) for name, array in arrays().items()}
    with pytest.raises(HookError) as error:
        SparseAutoencoder(**{"architecture": "relu", **weights, **fields})
    assert message in str(error.value)


def test_what_is_put_in_is_as_wide_as_it_is() -> None:
    sae = make()
    with pytest.raises(HookError, match="encodes \\[..., 6\\], got \\(2, 5\\)"):
        sae.encode(mx.zeros((2, 5)))
    with pytest.raises(HookError, match="decodes \\[..., 10\\], got \\(2, 5\\)"):
        sae.decode(mx.zeros((2, 5)))
    with pytest.raises(HookError, match="decode needs x: layer_norm goes back to its scale"):
        make(normalize_activations="layer_norm").decode(mx.zeros((2, 10)))
    with pytest.raises(HookError, match="feature is 0 to 9, got 10"):
        sae.direction(10)


# Files


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_what_was_saved_is_read_back_bit_for_bit(variant: dict[str, Any], tmp_path: Path) -> None:
    sae = make(**variant, metadata={"hook_name": "blocks.1.hook_resid_post", "note": "é"})
    again = SparseAutoencoder.load(sae.save(tmp_path / "deep" / "sae"))
    for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"):
        before, after = getattr(sae, name), getattr(again, name)
        assert (before is None) == (after is None)
        assert before is None or (before.dtype == after.dtype and mx.array_equal(before, after))
    for name in ("architecture", "k", "apply_b_dec_to_input", "normalize_activations", "rescale_acts_by_decoder_norm"):
        assert getattr(sae, name) == getattr(again, name)
    assert sae.metadata.items() <= again.metadata.items()
    x = mx.array(rows(5))
    assert mx.array_equal(sae(x), again(x))
    # What was read is saved as it was read.
    again.save(tmp_path / "again")
    for file in ("cfg.json", WEIGHTS):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "deep" / "sae" / file).read_bytes()


def test_the_folder_is_what_saelens_reads(tmp_path: Path) -> None:
    sae = make("topk", metadata={"hook_name": "blocks.1.hook_resid_post"}).with_log_sparsity(np.full(D_SAE, 0.1))
    sae.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cfg.json", WEIGHTS, "sparsity.safetensors"]
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert config | {"metadata": None} == {
        "architecture": "topk",
        "d_in": D_IN,
        "d_sae": D_SAE,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": None,
        "k": 3,
        "rescale_acts_by_decoder_norm": False,
    }
    # Without a version from 6 up SAELens would take it for a flat configuration.
    assert config["metadata"]["sae_lens_version"].startswith("6.")
    assert config["metadata"]["hook_name"] == "blocks.1.hook_resid_post"
    assert {name: array.shape for name, array in load_file(tmp_path / WEIGHTS).items()} == {
        "W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,),
    }  # fmt: skip
    np.testing.assert_allclose(load_file(tmp_path / "sparsity.safetensors")["sparsity"], -1.0, rtol=1e-6)
    assert make("relu").save(tmp_path / "relu").joinpath("cfg.json").read_text().count('"standard"') == 1
    with safe_open(make("jumprelu").save(tmp_path / "jump") / WEIGHTS, framework="numpy") as file:
        assert "threshold" in file.keys()  # noqa: SIM118


def test_saving_again_leaves_nothing_of_the_other_behind(tmp_path: Path) -> None:
    make().with_log_sparsity(np.full(D_SAE, 0.1)).save(tmp_path)
    make("jumprelu").save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cfg.json", WEIGHTS]
    assert SparseAutoencoder.load(tmp_path).log_sparsity is None


def test_what_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    make().save(tmp_path)
    with pytest.raises(HookError, match="metadata of an autoencoder are plain JSON values"):
        make("jumprelu", metadata={"x": object()}).save(tmp_path)
    assert SparseAutoencoder.load(tmp_path).architecture == "relu"
    (tmp_path / "file").touch()
    with pytest.raises(HookError, match="cannot write"):
        make().save(tmp_path / "file")


def write(folder: Path, config: dict[str, Any], **more: np.ndarray) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file({**arrays(), **more}, folder / WEIGHTS)
    return folder


V6 = {"architecture": "standard", "d_in": D_IN, "d_sae": D_SAE, "metadata": {"sae_lens_version": "6.0.0"}}
V3 = {
    "d_in": D_IN, "d_sae": D_SAE, "dtype": "torch.float32", "device": "cuda", "model_name": "gpt2-small",
    "hook_point": "blocks.2.hook_resid_pre", "hook_point_layer": 2, "hook_point_head_index": None,
    "activation_fn_str": "relu", "normalize_activations": False, "context_size": 128, "sae_lens_version": "3.5.0",
}  # fmt: skip

TOPK = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 2}}
JUMP = {"threshold": np.ones(D_SAE, np.float32)}


def test_the_flat_configuration_of_older_versions_is_read(tmp_path: Path) -> None:
    sae = SparseAutoencoder.load(write(tmp_path, V3))
    assert (sae.architecture, sae.hook_name, sae.apply_b_dec_to_input) == ("relu", "blocks.2.hook_resid_pre", True)
    assert sae.metadata["model_name"] == "gpt2-small"
    x = mx.array(rows(3))
    assert mx.array_equal(sae(x), make()(x))
    # Saved again it is one of version 6.
    assert SparseAutoencoder.load(sae.save(tmp_path / "new")).metadata["sae_lens_version"] == "6.0.0"
    assert not SparseAutoencoder.load(write(tmp_path, V3 | {"apply_b_dec_to_input": False})).apply_b_dec_to_input
    topk = SparseAutoencoder.load(write(tmp_path, V3 | {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 2}}))
    assert (topk.architecture, topk.k, topk.rescale_acts_by_decoder_norm) == ("topk", 2, False)
    # Of a topk k stands there whether its function is named or not.
    unnamed = {name: value for name, value in V3.items() if name != "activation_fn_str"}
    topk = SparseAutoencoder.load(write(tmp_path, unnamed | {"architecture": "topk", "activation_fn_kwargs": {"k": 2}}))
    assert (topk.architecture, topk.k) == ("topk", 2)
    heads = SparseAutoencoder.load(write(tmp_path, V3 | {"hook_point": "blocks.2.attn.hook_z"}))
    assert heads.reshape_activations == "hook_z"
    # A logarithm of the threshold is what some were saved with.
    log = np.full(D_SAE, np.log(0.3), np.float32)
    jump = SparseAutoencoder.load(write(tmp_path, V3 | {"architecture": "jumprelu"}, log_threshold=log))
    np.testing.assert_allclose(np.array(jump.threshold), 0.3, rtol=1e-6)
    ones = {"scaling_factor": np.ones(D_SAE, np.float32)}
    assert SparseAutoencoder.load(write(tmp_path, V3, **ones)).d_sae == D_SAE


def test_a_scale_of_the_input_is_folded_into_the_weights(tmp_path: Path) -> None:
    config = V6 | {"normalize_activations": "expected_average_only_in"}
    write(tmp_path, config)
    with pytest.raises(HookError, match="no factor is told: give norm_scaling_factor"):
        SparseAutoencoder.load(tmp_path)
    sae = SparseAutoencoder.load(tmp_path, norm_scaling_factor=0.25)
    assert sae.normalize_activations == "none"
    x = rows(4)
    features, read = saelens(make(), 0.25 * x)
    np.testing.assert_allclose(np.array(sae.encode(mx.array(x))), features, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.array(sae(mx.array(x))), read / 0.25, rtol=1e-4, atol=1e-5)
    (tmp_path / "activation_scaler.json").write_text('{"scaling_factor": 0.25}')
    assert mx.array_equal(SparseAutoencoder.load(tmp_path).W_enc, sae.W_enc)
    # Older ones say so by a truth value.
    old = SparseAutoencoder.load(
        write(tmp_path / "old", V3 | {"normalize_activations": True}), norm_scaling_factor=0.25
    )
    assert mx.array_equal(old.W_enc, sae.W_enc)
    with pytest.raises(HookError, match="normalize_activations is 'none', which takes no factor"):
        SparseAutoencoder.load(write(tmp_path / "none", V6), norm_scaling_factor=2.0)


@pytest.mark.parametrize(
    ("config", "more", "message"),
    [
        (V6 | {"architecture": "gated"}, {}, "its architecture is 'gated', and standard, topk, jumprelu"),
        (V6 | {"architecture": "batchtopk"}, {}, "SAELens saves what BatchTopK trained as jumprelu"),
        (V6 | {"normalize_activations": "covariance_whitening"}, {}, "its normalize_activations is 'covariance_whit"),
        (V6 | {"reshape_activations": "hook_q"}, {}, "its reshape_activations is 'hook_q'"),
        (V6 | {"dtype": "float64"}, {}, "its dtype is 'float64'"),
        (V6 | {"architecture": "topk"}, {}, "cfg.json lacks 'k'"),
        (V6 | {"d_in": 7}, {}, "W_enc is (6, 10), and cfg.json says (7, 10)"),
        (V6 | {"architecture": "jumprelu"}, {}, "expected W_dec, W_enc, b_dec, b_enc, threshold"),
        (V6, {"r_mag": np.zeros(3, np.float32)}, "holds W_dec, W_enc, b_dec, b_enc, r_mag"),
        (V6, {"scaling_factor": np.full(D_SAE, 2.0, np.float32)}, "scaling_factor is not honoured"),
        (V3 | {"activation_fn_str": "tanh-relu"}, {}, "its activation_fn is 'tanh-relu'"),
        (V3 | {"finetuning_scaling_factor": True}, {}, "finetuning_scaling_factor is not honoured"),
        (V3 | {"architecture": "gated", **TOPK}, {}, "its architecture is 'gated' with activation_fn 'topk'"),
        (V3 | {"architecture": "jumprelu", **TOPK}, JUMP, "its architecture is 'jumprelu' with activation_fn 'topk'"),
        (V3 | {"architecture": "topk"}, {}, "its k is None, and a whole number is expected"),
        (V6 | {"architecture": "topk", "k": 2.5}, {}, "its k is 2.5, and a whole number is expected"),
        (V6 | {"architecture": "topk", "k": "3"}, {}, "its k is '3', and a whole number is expected"),
        (V6 | {"d_in": 6.5}, {}, "its d_in is 6.5, and a whole number is expected"),
        (V6 | {"apply_b_dec_to_input": "false"}, {}, "its apply_b_dec_to_input is 'false', and true or false is exp"),
        (V6 | {"apply_b_dec_to_input": None}, {}, "its apply_b_dec_to_input is None, and true or false is expected"),
        (
            V6 | {"architecture": "topk", "k": 3, "rescale_acts_by_decoder_norm": "false"},
            {},
            "its rescale_acts_by_decoder_norm is 'false', and true or false is expected",
        ),
        (
            V3 | {"hook_name_out": "blocks.2.hook_mlp_out"},
            {},
            "its hook_name_out is 'blocks.2.hook_mlp_out' and its hook",
        ),
        (
            V6 | {"metadata": {**V6["metadata"], "hook_name": "a", "hook_name_out": "b"}},
            {},
            "its hook_name_out is 'b' and its hook_name 'a': what reads one place and writes another is not honoured",
        ),
        (V6 | {"d_out": 9}, {}, "its d_out is 9 and its d_in 6"),
        ([1], {}, "holds no mapping"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(
    config: Any, more: dict[str, np.ndarray], message: str, tmp_path: Path
) -> None:
    with pytest.raises(HookError) as error:
        SparseAutoencoder.load(write(tmp_path, config, **more))
    assert message in str(error.value)


def test_a_folder_that_is_none_is_told(tmp_path: Path) -> None:
    with pytest.raises(HookError, match="There is no file .*cfg.json"):
        SparseAutoencoder.load(tmp_path / "nowhere")
    write(tmp_path, V6)
    (tmp_path / WEIGHTS).write_bytes(b"no")
    with pytest.raises(HookError, match="too short to be a safetensors file"):
        SparseAutoencoder.load(tmp_path)
    (tmp_path / "cfg.json").write_text("{")
    with pytest.raises(HookError, match="is no autoencoder that can be read"):
        SparseAutoencoder.load(tmp_path)


# Edits

POINT = "blocks.1.hook_resid_post"
TOKENS = [[5, 17, 3, 40, 22, 9]]


def at_a_layer(model: HookedModel, architecture: str = "jumprelu", **fields: Any) -> SparseAutoencoder:
    weights = {name: mx.array(array) for name, array in arrays(3, model.cfg.d_model, 20).items()}
    if architecture == "jumprelu":
        weights["threshold"] = mx.full((20,), 0.5)
    return SparseAutoencoder(architecture, **weights, metadata={"hook_name": POINT}, **fields)


def test_steering_adds_a_direction_in_units_of_activation(llama: HookedModel) -> None:
    sae = at_a_layer(llama)
    _, plain = llama.run_with_cache(TOKENS, POINT)
    _, steered = llama.run_with_cache(TOKENS, POINT, interventions=[sae.steering(4, 2.5)])
    expected = np.array(plain[POINT], np.float64) + 2.5 * np.array(sae.W_dec, np.float64)[4]
    np.testing.assert_allclose(np.array(steered[POINT]), expected, rtol=1e-5, atol=1e-5)
    # It is what the autoencoder would read back if the latent were that much more active.
    features = np.array(sae.encode(plain[POINT]))
    more = features + 2.5 * np.eye(20)[4]
    apart = np.array(sae.decode(mx.array(more.astype(np.float32)))) - np.array(sae(plain[POINT]))
    np.testing.assert_allclose(apart, np.broadcast_to(expected - np.array(plain[POINT]), apart.shape), atol=1e-4)
    some = sae.steering(4, 2.5, positions=[1], hook_point="blocks.0.hook_resid_post")
    assert (some.hook_point, list(some.positions)) == ("blocks.0.hook_resid_post", [1])


def test_ablating_a_latent_takes_off_what_it_contributes_and_keeps_the_error(llama: HookedModel) -> None:
    for fields in ({}, {"normalize_activations": "layer_norm"}):
        sae = at_a_layer(llama, **fields)
        _, plain = llama.run_with_cache(TOKENS, POINT)
        x = np.array(plain[POINT], np.float64)
        features, read = saelens(sae, x)
        feature = int(features.sum(axis=(0, 1)).argmax())
        assert features[..., feature].any()
        without = features.copy()
        without[..., feature] = 0.0
        factor = x.std(axis=-1, ddof=1, keepdims=True) if fields else 1.0
        direction = np.array(sae.W_dec, np.float64)[feature]
        expected = x - features[..., [feature]] * direction * factor
        with llama.hooks([(POINT, sae.ablate_feature(feature))]):
            _, ablated = llama.run_with_cache(TOKENS, POINT)
        np.testing.assert_allclose(np.array(ablated[POINT]), expected, rtol=1e-4, atol=1e-4)
        with llama.hooks([(POINT, sae.set_feature(feature, 3.0))]):
            _, set_to = llama.run_with_cache(TOKENS, POINT)
        np.testing.assert_allclose(np.array(set_to[POINT]), expected + 3 * direction * factor, rtol=1e-4, atol=1e-4)
        with llama.hooks([(POINT, sae.replace_value())]):
            _, replaced = llama.run_with_cache(TOKENS, POINT)
        np.testing.assert_allclose(np.array(replaced[POINT]), read, rtol=1e-4, atol=1e-4)


def test_steering_of_heads_side_by_side(llama: HookedModel) -> None:
    heads, d_head = llama.cfg.n_heads, llama.cfg.d_head
    point = "blocks.1.attn.hook_z"
    weights = {name: mx.array(array) for name, array in arrays(3, heads * d_head, 20).items()}
    sae = SparseAutoencoder("relu", **weights, reshape_activations="hook_z", metadata={"hook_name": point})
    with pytest.raises(HookError, match="shape is missing"):
        sae.steering(2, 1.5)
    _, plain = llama.run_with_cache(TOKENS, point)
    _, steered = llama.run_with_cache(TOKENS, point, interventions=[sae.steering(2, 1.5, shape=(heads, d_head))])
    added = np.array(steered[point]) - np.array(plain[point])
    np.testing.assert_allclose(added[0, 3].reshape(-1), 1.5 * np.array(sae.W_dec)[2], rtol=1e-4, atol=1e-4)


def test_edits_of_an_autoencoder_of_one_head_leave_the_others(llama: HookedModel) -> None:
    point, head = "blocks.1.attn.hook_z", 2
    weights = {name: mx.array(array) for name, array in arrays(3, llama.cfg.d_head, 20).items()}
    sae = SparseAutoencoder("relu", **weights, metadata={"hook_name": point, "hook_head_index": head})
    _, plain = llama.run_with_cache(TOKENS, point)
    z = np.array(plain[point], np.float64)
    features, read = saelens(sae, z[:, :, head])
    feature = int(features.sum(axis=(0, 1)).argmax())
    direction = np.array(sae.W_dec, np.float64)[feature]
    without = z[:, :, head] - features[..., [feature]] * direction
    edits = {
        "steering": (z[:, :, head] + 1.5 * direction, {"interventions": [sae.steering(feature, 1.5)]}),
        "ablate": (without, sae.ablate_feature(feature)),
        "set": (without + 3 * direction, sae.set_feature(feature, 3.0)),
        "replace": (read, sae.replace_value()),
    }
    for name, (expected, edit) in edits.items():
        if isinstance(edit, dict):
            _, edited = llama.run_with_cache(TOKENS, point, **edit)
        else:
            with llama.hooks([(point, edit)]):
                _, edited = llama.run_with_cache(TOKENS, point)
        found = np.array(edited[point])
        np.testing.assert_allclose(found[:, :, head], expected, rtol=1e-4, atol=1e-4, err_msg=name)
        others = [i for i in range(llama.cfg.n_heads) if i != head]
        np.testing.assert_array_equal(found[:, :, others], np.array(plain[point])[:, :, others], err_msg=name)
    beyond = SparseAutoencoder("relu", **weights, metadata={"hook_name": point, "hook_head_index": 9})
    with pytest.raises(HookError, match="belongs to head 9, and a row is \\(4, 8\\)"):
        llama.run_with_hooks(TOKENS, [(point, beyond.ablate_feature(0))])


def test_steering_that_cannot_be_is_refused(llama: HookedModel) -> None:
    with pytest.raises(HookError, match="another length in every row"):
        at_a_layer(llama, normalize_activations="layer_norm").steering(0, 1.0)
    with pytest.raises(HookError, match="does not say where it belongs: give hook_point"):
        make().steering(0, 1.0)
    with pytest.raises(HookError, match="feature is 0 to 9, got -1"):
        make().steering(-1, 1.0)
    with pytest.raises(HookError, match="activation is a finite number"):
        make().set_feature(0, float("nan"))
    with pytest.raises(HookError, match="reads rows of 6 numbers, got \\(32,\\)"):
        llama.run_with_hooks(TOKENS, [(POINT, make().ablate_feature(0))])
