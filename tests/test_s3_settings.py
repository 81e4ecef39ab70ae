"""Stores and photographs look for S3 in the same place, by AWS's own rules, or say in one line why not."""

import os
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest

from feature_store import FeatureStore, StoreError
from feature_store.storage import open_folder
from feature_store.storage.object_store import s3_settings
from fsdino.data.dataset import open_dataset
from fsdino.errors import UserError
from tests.conftest import ROOT
from tests.servers import FaultProxy

CLEAN = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", "AWS_PROFILE")


@pytest.fixture
def nothing_set(s3_endpoint, monkeypatch, tmp_path):
    """No setting of AWS but that this machine is none of theirs."""
    for name in CLEAN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    fsspec.filesystem("s3").clear_instance_cache()
    yield s3_endpoint
    fsspec.filesystem("s3").clear_instance_cache()


def test_a_configuration_file_leads_stores_and_photographs_to_the_same_place(nothing_set, monkeypatch, tmp_path):
    (tmp_path / "config").write_text(
        f"[profile ours]\nregion = eu-central-1\nendpoint_url = {nothing_set}\naws_access_key_id = test\n"
        "aws_secret_access_key = test\ns3 =\n  addressing_style = path\n"
    )
    monkeypatch.setenv("AWS_PROFILE", "ours")
    open_folder("s3://features/settings").write("a.txt", [b"by obstore"])
    assert fsspec.filesystem("s3").cat_file("features/settings/a.txt") == b"by obstore"
    assert s3_settings("s3://features", "features")["region"] == "eu-central-1"


def test_addressing_and_endpoints_become_obstores(nothing_set, monkeypatch, tmp_path):
    keys = "aws_access_key_id = test\naws_secret_access_key = test\n"
    (tmp_path / "config").write_text(f"[default]\n{keys}s3 =\n  addressing_style = virtual\n")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://minio:9000")
    virtual = s3_settings("s3://photos", "photos")
    assert virtual["virtual_hosted_style_request"] and virtual["endpoint"] == "http://photos.minio:9000"
    (tmp_path / "config").write_text(f"[default]\n{keys}")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://other:9000")
    assert s3_settings("s3://photos", "photos")["endpoint"] == "http://other:9000"
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    assert "endpoint" not in s3_settings("s3://photos", "photos")


def test_settings_that_lead_nowhere_are_said_in_one_line(nothing_set, monkeypatch):
    with pytest.raises(StoreError, match="expected credentials for S3, found none; set AWS_ACCESS_KEY_ID"):
        FeatureStore("s3://features/x")
    with pytest.raises(UserError, match="expected credentials for it, found none"):
        open_dataset("s3://features/shapes")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(StoreError, match=r"are not usable \(The config profile \(nobody\) could not be found\)"):
        FeatureStore("s3://features/x")
    monkeypatch.delenv("AWS_PROFILE")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "127.0.0.1:9000")
    with pytest.raises(StoreError, match=r"are not usable \(Invalid endpoint: 127\.0\.0\.1:9000\)"):
        FeatureStore("s3://features/x")


def test_a_bucket_that_does_not_exist_is_named(s3_endpoint):
    with pytest.raises(StoreError, match="expected the bucket nosuch, found none of that name there; create it first"):
        FeatureStore("s3://nosuch/x")
    with pytest.raises(UserError, match="nosuch"):
        open_dataset("s3://nosuch/x")


def test_what_may_not_be_read_is_the_users_matter(s3_endpoint, monkeypatch):
    with FaultProxy(s3_endpoint, share=0) as proxy:
        proxy.answer_all = 403
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
        fsspec.filesystem("s3").clear_instance_cache()
        with pytest.raises(StoreError, match="the object store refuses"):
            FeatureStore("s3://features/x")
        with pytest.raises(UserError, match="check path, permissions and credentials"):
            open_dataset("s3://features/shapes")
    fsspec.filesystem("s3").clear_instance_cache()


def test_ls_fails_where_an_entry_failed(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "zarr.json").write_text("{")
    line = [sys.executable, "-m", "feature_store", "ls", str(tmp_path)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 1 and str(Path(tmp_path) / "other") in done.stdout.splitlines()[-1]
