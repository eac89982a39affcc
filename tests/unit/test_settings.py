"""Where settings come from, which wins, and what is said when one is wrong (P12)."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path

import pytest

from statecache import settings
from statecache.core import errors, keys, model
from statecache.hot.store import HotStore

EXAMPLE = Path(__file__).parents[2] / "config" / "statecache.example.toml"


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.upper().startswith(settings.ENV_PREFIX):
            monkeypatch.delenv(name)


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "statecache.toml"
    path.write_text('namespace = "from_file"\npartition_count = 4\nlag_target_seconds = 2\n')
    return path


def test_defaults_are_an_embedded_store() -> None:
    found = settings.Settings()
    assert found.redis_url is None
    assert found.database_url is None
    assert found.durability is model.Durability.HOT
    assert found.limits.id_length_max == 200


def test_arguments_win_over_environment_wins_over_file(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATECACHE_PARTITION_COUNT", "8")
    monkeypatch.setenv("STATECACHE_NAMESPACE", "from_environment")
    found = settings.Settings(config_file=config_file, namespace="from_arguments")
    assert (found.namespace, found.partition_count, found.lag_target_seconds) == ("from_arguments", 8, 2.0)
    assert found.flush_interval_ms == 50


def test_config_file_may_be_named_by_the_environment(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATECACHE_CONFIG_FILE", str(config_file))
    assert settings.Settings().namespace == "from_file"


def test_none_and_an_empty_variable_count_as_not_given(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATECACHE_NAMESPACE", "")
    assert settings.Settings(config_file=config_file, namespace=None).namespace == "from_file"


def test_folders_in_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    monkeypatch.setenv("STATECACHE_RETENTION_ARCHIVE_DIR", "~/archive")
    found = settings.Settings(data_dir=Path("~/data"), export_dir="~")
    assert found.data_dir == Path("/home/ann/data")
    assert (found.retention_archive_dir, found.export_dir) == (Path("/home/ann/archive"), Path("/home/ann"))


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        settings.Settings().namespace = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("partition_count", "many", r"partition_count = 'many' in the arguments is refused: .*valid integer"),
        ("partition_count", 0, "partition count 0 is refused: 1 to 1024 are allowed"),
        ("namespace", "a b", "namespace 'a b' is refused"),
        ("durability", "forever", r"durability = 'forever' .*'hot', 'fsync', 'replica' or 'durable'"),
        ("lag_target_seconds", float("nan"), r"lag_target_seconds = nan .*finite"),
        ("flush_interval_ms", 0, r"flush_interval_ms = 0 .*greater than 0"),
        ("patch_fields_max", 3001, r"patch_fields_max = 3001 .*less than or equal to 3000"),
        ("instance_fields_max", 10_000, r"instance_fields_max = 10000 .*less than or equal to 3000"),
        ("redis_url", "localhost:6379", "it must begin with redis://, rediss:// or unix:///"),
        ("redis_url", "", "it must begin with redis://"),
        ("redis_url", "unix://host/run/redis.sock", "it must begin with redis://"),
        ("redis_url", "unix://u:p@", "it must begin with redis://"),
        ("redis_url", "redis://u:p@host:6379/orders", "behind the host stands the number of a database"),
        ("rq_redis_url", "rediss://host/0/1?x=1", "behind the host stands the number of a database"),
        ("redis_url", f"redis://{'a' * 64}:6379", "its host can be no name of a server"),
        ("rq_redis_url", "redis://host%2e%2eexample", "its host can be no name of a server"),
        ("redis_url", "redis://\udcff", "its host can be no name of a server"),
        ("data_dir", "~nobody-of-this-name/data", "there is no home folder of that user"),
        ("export_dir", "~nobody-of-this-name", "there is no home folder of that user"),
        ("database_url", "orders.db", "it must be an SQLAlchemy URL"),
        ("identity_check", "never", "'interval' or 'always'"),
        ("namespcae", "x", r"unknown setting 'namespcae' in the arguments: did you mean namespace\?"),
    ],
)
def test_refusal_names_setting_value_and_rule(name: str, value: object, message: str) -> None:
    with pytest.raises(errors.ConfigurationError, match=message):
        settings.Settings(**{name: value})


@pytest.mark.parametrize(
    "url",
    [
        "redis://host",
        "redis://host/",
        "redis://u:p@host/15?a=b/c",
        "redis://[::1]:6379?db=3",
        "unix:///run/redis.sock",
        "unix://u:p%40s%2Fs@/run/redis.sock?db=2",
        "unix://:p@/run/redis.sock",
    ],
)
def test_a_url_with_or_without_a_database(url: str) -> None:
    assert settings.Settings(redis_url=url).redis_url == url


@pytest.mark.parametrize("password", ["hunter/2", "hunter/2@2", "hunter#2", "hunter?2"])
@pytest.mark.parametrize("url", ["redis://u:{}@host:6379/0", "unix://u:{}@/run/redis.sock?db=one"])
def test_a_password_that_should_be_quoted_is_not_shown(url: str, password: str) -> None:
    with pytest.raises(errors.ConfigurationError) as caught:
        HotStore(keys.Keyspace("x", 1), url=settings.Settings(redis_url=url.format(password)).redis_url)
    assert "unter" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "partition_count",
        "replicas",
        "lag_target_seconds",
        "flush_batch_entries",
        "metrics_port",
        "hot_memory_share",
        "namespace",
    ],
)
def test_a_truth_value_is_no_number(tmp_path: Path, name: str) -> None:
    path = tmp_path / "statecache.toml"
    path.write_text(f"{name} = true\n", encoding="utf-8")
    with pytest.raises(
        errors.ConfigurationError, match=f"{name} = True in the config file is refused: it is no truth value"
    ):
        settings.Settings(config_file=path)


def test_truth_values_where_they_belong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "statecache.toml"
    path.write_text("auto_recover = false\npartition_count = 1\n", encoding="utf-8")
    monkeypatch.setenv("STATECACHE_WARM_AFTER_RECOVERY", "false")
    monkeypatch.setenv("STATECACHE_REPLICAS", "2")
    made = settings.Settings(config_file=path)
    assert (made.auto_recover, made.partition_count, made.warm_after_recovery, made.replicas) == (False, 1, False, 2)


def test_refusal_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATECACHE_FLUSH_INTERVAL_MS", "fast")
    with pytest.raises(errors.ConfigurationError, match=r"'fast' in the environment \(STATECACHE_FLUSH_INTERVAL_MS\)"):
        settings.Settings()


def test_every_wrong_setting_is_told_at_once() -> None:
    with pytest.raises(errors.ConfigurationError, match=r"(?s)flush_interval_ms.*batch_items_max"):
        settings.Settings(flush_interval_ms=0, batch_items_max=0)


def test_refusal_hides_passwords_also_in_the_chain_of_causes() -> None:
    with pytest.raises(errors.ConfigurationError) as caught:
        settings.Settings(redis_url="http://user:hunter2@host/0?password=hunter2")
    assert "hunter2" not in str(caught.value)
    assert "user:***@host" in str(caught.value)
    assert caught.value.__suppress_context__


def test_repr_hides_passwords() -> None:
    found = settings.Settings(redis_url="redis://:hunter2@host/0", database_url="postgresql://u:hunter2@host/db")
    assert "hunter2" not in repr(found) + str(found)
    assert found.redis_url == "redis://:hunter2@host/0"


def test_unknown_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATECACHE_REDIS_ULR", "redis://localhost")
    message = r"unknown environment variable STATECACHE_REDIS_ULR: did you mean STATECACHE_REDIS_URL\?"
    with pytest.raises(errors.ConfigurationError, match=message):
        settings.Settings()


def test_variables_of_other_parts_are_let_be(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FAILPOINT", "FAILPOINTS", "TEST_SERVER"):
        monkeypatch.setenv(f"STATECACHE_{name}", "x")
    assert settings.Settings()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("namespace = ", "is not valid TOML"),
        ("namespce = 'x'", r"unknown setting 'namespce' in the config file: did you mean namespace\?"),
        ("[flush]\ninterval_ms = 3", "unknown setting 'flush' in the config file"),
        ("flush_interval_ms = 'soon'", "flush_interval_ms = 'soon' in the config file is refused"),
        ("config_file = 'other.toml'", "cannot name another one"),
    ],
)
def test_wrong_config_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "statecache.toml"
    path.write_text(text)
    with pytest.raises(errors.ConfigurationError, match=message):
        settings.Settings(config_file=path)


def test_missing_config_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigurationError, match="cannot be read: No such file"):
        settings.Settings(config_file=tmp_path / "absent.toml")


def test_example_file_shows_every_setting_with_its_default() -> None:
    shown = re.sub(r"(?m)^# (?=[a-z_]+ = )", "", EXAMPLE.read_text())
    values = tomllib.loads(shown)
    fields = settings.Settings.model_fields
    without_default = {"config_file", "redis_url", "database_url", "metrics_port", "web_token", "flush_batch_entries"}
    without_default |= {"rq_redis_url", "retention_archive_dir", "export_dir"}
    assert set(values) == set(fields) - {"config_file"}
    expected = {name: field.default for name, field in fields.items() if name not in without_default}
    expected["data_dir"] = str(expected["data_dir"])
    assert {name: value for name, value in values.items() if name not in without_default} == expected
    settings.Settings(**values)


def test_example_file_as_it_is_changes_nothing() -> None:
    found = settings.Settings(config_file=EXAMPLE)
    assert found.model_copy(update={"config_file": None}) == settings.Settings()


def test_every_setting_is_documented() -> None:
    assert all(field.description for field in settings.Settings.model_fields.values())


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://host:6379/0", "redis://host:6379/0"),
        ("redis://:pw@host:6379/0", "redis://:***@host:6379/0"),
        ("redis://user:p@ss/word@host", "redis://user:***@host"),
        ("redis://user:p?w@host", "redis://user:***@host"),
        ("redis://user:p#w@host", "redis://user:***@host"),
        ("unix:///run/redis.sock?db=1&password=pw", "unix:///run/redis.sock?db=1&password=***"),
        ("unix://u:pw@/run/redis.sock?db=1", "unix://u:***@/run/redis.sock?db=1"),
        ("postgresql+psycopg://u:pw@h/db?sslmode=require", "postgresql+psycopg://u:***@h/db?sslmode=require"),
        ("postgresql://h/db?user=a@b&sslpassword=pw&apikey=k", "postgresql://h/db?user=a@b&sslpassword=***&apikey=***"),
        ("host=h user=u password=pw", "host=h user=u password=***"),
        ("sqlite:////folder/store.db", "sqlite:////folder/store.db"),
        ("", ""),
    ],
)
def test_redact(url: str, shown: str) -> None:
    assert settings.redact(url) == shown
