"""What fedseal assumes of Flower's private parts, one test per assumption.

When an upgrade of Flower breaks something, the name and the message of the test that fails say which
assumption of `server.flower` or `client.flower` has to be thought over.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import os
import re
import shutil
import sys
from datetime import timedelta
from importlib.metadata import entry_points, version
from pathlib import Path
from types import ModuleType
from typing import Any

import flwr
import flwr.app
import flwr.serverapp
import httpx
import pytest

import server.flower.grid
from crypto.authority import CLOCK_SKEW, create_authority
from protocol.admission import CLOCK_TOLERANCE_S
from protocol.environment import FLOWER_ENVIRONMENT
from protocol.errors import FlowerChanged
from protocol.records import LARGE_BLOB_BYTES, from_record, to_record
from server.flower.clock import TIMESTAMP_HEADER, tolerate_clocks
from server.flower.control import _bundle
from server.flower.grid import set_identity
from server.flower.objects import ON_DISK_BYTES, RESERVED_BYTES, DiskObjectStore
from server.flower.programs import SUPEREXEC, Executor
from server.flower.starts import _ACQUIRE_PATH, _LONGEST_WAIT_S, _START_PATH
from server.flower.superlink import SuperLinkOptions, superlink_app
from tests.credentials import server_of

ROOT = Path(flwr.__file__).parent
FLEET = "flwr.supernode.fleet_http_connection"


def module(name: str) -> ModuleType:
    """Import a module that fedseal names; `import_module`, because packages hide modules by functions."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        pytest.fail(f"Flower has no module {name} any more: {error}")


def member(module_name: str, name: str) -> Any:
    """Return something that fedseal takes from a module of Flower."""
    found = getattr(module(module_name), name, None)
    assert found is not None, f"{module_name} has no {name} any more"
    return found


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def source(module_name: str) -> str:
    return inspect.getsource(module(module_name))


def test_version_is_the_one_that_was_read() -> None:
    assert version("flwr") == "1.41.0", "read server/flower/ and client/flower.py against the new version"
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert '"flwr==' + version("flwr") + '"' in text, "pyproject.toml pins another version"


# --- the coordinator -----------------------------------------------------------------------------------


def test_superlink_configuration_is_parsed_from_the_command_line() -> None:
    parse = member("flwr.superlink.cli.flower_superlink", "_parse_superlink_lifespan_config")
    assert parameters(parse) == [], "_parse_superlink_lifespan_config takes arguments now"
    assert "sys.argv" in source("flwr.superlink.cli.flower_superlink"), "sys.argv is not read any more"


def test_superlink_is_an_asgi_app_of_configuration_and_lifespan_class() -> None:
    create_app = member("flwr.superlink.main", "create_app")
    assert parameters(create_app) == ["config", "superlink_lifespan_class"], (
        "create_app's signature changed"
    )
    member("flwr.superlink.cli.flower_superlink", "SuperLinkLifespan")


def test_superlink_takes_our_options_and_keeps_its_state_in_memory(tmp_path: Path) -> None:
    module_name = "flwr.superlink.cli.flower_superlink"
    seen: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        main = module("flwr.superlink.main")
        patch.setattr(main, "create_app", lambda config, lifespan: seen.append((config, lifespan)))
        patch.setenv("FLWR_HOME", str(tmp_path))
        before = list(sys.argv)
        superlink_app(_options(tmp_path), Executor())
        assert sys.argv == before
    config, build = seen[0]
    assert isinstance(build(config, _LinkState()), member(module_name, "SuperLinkLifespan"))
    assert config.host == "127.0.0.1", "--host does not set the address of the runtime API"
    assert config.port == 12345, "--port does not set the port of the runtime API"
    assert config.enable_supernode_auth is True, "--enable-supernode-auth does nothing"
    assert config.runtime_dependency_install is False, "packages would be installed at run time"
    assert config.database == member("flwr.supercore.constant", "FLWR_IN_MEMORY_DB_NAME")
    assert not config.simulation, "the SuperLink would simulate"
    assert config.isolation == "subprocess", "the ServerApp would run in the coordinator's process"


class _LinkState:
    """What Flower's lifespan takes at its making."""

    objectstore_factory = None


def test_executor_is_started_by_its_own_command_line_and_ended_at_shutdown() -> None:
    lifespan = member("flwr.superlink.cli.flower_superlink", "SuperLinkLifespan")
    text = inspect.getsource(lifespan)
    assert "self.superexec_process = subprocess.Popen(command" in text, "it is started in another way"
    assert "self._start_superexec_if_needed()" in text, "startup does not start it by this method any more"
    command = member("flwr.superlink.cli.flower_superlink", "_get_superexec_command")
    assert f'command = ["{SUPEREXEC}"]' in inspect.getsource(command), "the program has another name"


def test_run_process_is_started_by_popen_of_the_executors_module() -> None:
    text = source("flwr.supercore.superexec.executor.subprocess_executor")
    assert text.count("subprocess.Popen(") == 2, "the run's own process is started in another way"
    assert set(re.findall(r"subprocess\.(\w+)", text)) == {"Popen", "DEVNULL"}
    for name in (SUPEREXEC, "flwr-serverapp"):
        assert len(entry_points(group="console_scripts", name=name)) == 1, (
            f"{name} is not a program any more"
        )


def _options(folder: Path) -> SuperLinkOptions:
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    authority = create_authority("contract", 1)
    issued = server_of(authority, ["127.0.0.1"], 1)
    (folder / "ca.crt").write_bytes(authority.certificate.public_bytes(Encoding.PEM))
    (folder / "server.crt").write_bytes(issued.certificate.public_bytes(Encoding.PEM))
    pem = issued.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / "server.key").write_bytes(pem)
    key_file = str(folder / "server.key")
    return SuperLinkOptions(
        12345, folder / "ca.crt", folder / "server.crt", key_file, "", folder / "objects"
    )


def test_legacy_network_servers_stay_off_unless_asked_for() -> None:
    text = source("flwr.superlink.cli.flower_superlink")
    for name in ("FLWR_INTERNAL_GRPC_CONTROL_API", "FLWR_INTERNAL_GRPC_FLEET_API"):
        assert f'os.getenv({name}) == "1"' in text, f"{name} does not guard Flower's old server any more"
        value = getattr(module("flwr.superlink.cli.flower_superlink"), name)
        assert value not in FLOWER_ENVIRONMENT


def test_control_client_has_the_calls_that_we_make() -> None:
    client = member("flwr.supercore.control", "ControlHttpClient")
    for name in ("RegisterNode", "StartRun", "StopRun", "ListRuns", "close"):
        assert callable(getattr(client, name, None)), f"ControlHttpClient has no {name} any more"
    made = client("http://nowhere.invalid", interceptors=[])
    assert isinstance(made._client, httpx.Client), "the HTTP client is not kept as _client any more"
    made.close()


def test_control_api_asks_nobody_who_he_is() -> None:
    """This is why no listener serves it; if Flower ever asks, that may be reconsidered."""
    load = member("flwr.superlink.config_loader", "load_control_authn_plugin")
    assert type(load()).__name__ == "NoOpControlAuthnPlugin"


def test_tolerance_for_clocks_is_two_constants_of_the_judging_module() -> None:
    """Their window is what `server.flower.clock` widens."""
    name = "flwr.superlink.routers.fleet.node_auth"
    text = inspect.getsource(member(name, "authenticate_node"))
    assert "not -SYSTEM_TIME_TOLERANCE" in text
    assert "< TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE" in text
    constants = "flwr.common.constant"
    assert member(constants, "SYSTEM_TIME_TOLERANCE") == 5, "Flower tolerates something else now"
    assert member(constants, "TIMESTAMP_TOLERANCE") == 300
    assert member(constants, "TIMESTAMP_HEADER") == TIMESTAMP_HEADER
    tolerate_clocks()
    tolerate_clocks()
    judge = module(name)
    assert judge.SYSTEM_TIME_TOLERANCE == CLOCK_TOLERANCE_S
    assert judge.SYSTEM_TIME_TOLERANCE + judge.TIMESTAMP_TOLERANCE == 305, "Flower's own end of its window"
    assert timedelta(seconds=CLOCK_TOLERANCE_S) == CLOCK_SKEW, "an authority's certificates are dated back"


def test_another_tolerance_for_clocks_is_not_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module("flwr.superlink.routers.fleet.node_auth"), "TIMESTAMP_TOLERANCE", 30)
    with pytest.raises(FlowerChanged):
        tolerate_clocks()


def test_node_signs_the_time_that_its_interceptor_s_clock_shows() -> None:
    text = source("flwr.supernode.node_auth_http_interceptor")
    assert "timestamp = now().isoformat()" in text


def test_starts_and_questions_for_a_task_have_the_paths_by_which_one_waits_for_the_other() -> None:
    for path, module_name, name in (
        (_START_PATH, "flwr.supercore.control", "ControlHttpClient"),
        (_ACQUIRE_PATH, "flwr.supercore.runtime.runtime_http_client", "RuntimeHttpClient"),
    ):
        client = member(module_name, name)
        call = client.StartRun if path == _START_PATH else client.AcquireTask
        assert f'path="{path}"' in inspect.getsource(call), f"{name} asks elsewhere now"
        # a question that waits must be over long before its client gives up
        assert inspect.signature(client).parameters["timeout"].default >= 10 * _LONGEST_WAIT_S


def test_runtime_api_wants_a_token_for_all_but_acquiring_a_task() -> None:
    text = source("flwr.supercore.routers.runtime.router")
    routes = text.count("@router.post(")
    assert text.count("task: TaskDependency") == routes - 1
    assert text.count("_auth: AcquireTaskAuthDependency") == 1


def test_control_client_names_its_version_by_an_interceptor() -> None:
    interceptor = member("flwr.supercore.interceptors", "RuntimeVersionHttpInterceptor")
    assert parameters(interceptor.__init__) == ["self", "component_name"]


@pytest.mark.parametrize(
    ("request_name", "fields"),
    [
        ("RegisterNodeRequest", {"public_key", "name"}),
        ("StartRunRequest", {"fab", "override_config"}),
        ("StopRunRequest", {"run_id"}),
        ("ListRunsRequest", {"run_id"}),
        ("ListRunsResponse", {"run_dict"}),
        ("StartRunResponse", {"run_id"}),
    ],
)
def test_control_requests_have_the_fields_that_we_fill_in(request_name: str, fields: set[str]) -> None:
    descriptor = member("flwr.proto.control_pb2", request_name).DESCRIPTOR
    missing = fields - set(descriptor.fields_by_name)
    assert not missing, f"{request_name} has no {missing} any more"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_bundle_is_built_from_a_configuration_without_code() -> None:
    bundle = _bundle()
    from flwr.common.serde import fab_to_proto

    assert fab_to_proto(bundle).hash_str == bundle.hash_str
    assert len(bundle.content) < 4096, "the bundle holds more than a configuration"


def test_grid_is_the_http_grid_of_the_installed_version() -> None:
    grid = member("flwr.superlink.grid.http_grid", "HttpGrid")
    for name in ("push_messages", "pull_messages", "get_nodes", "get_node_ids"):
        assert callable(getattr(grid, name, None)), f"HttpGrid has no {name} any more"
    assert issubclass(grid, flwr.serverapp.Grid)


def test_grid_keeps_the_client_that_batches_are_sent_by() -> None:
    text = source("flwr.superlink.grid.http_grid")
    assert "def _runtime_client(self)" in text, "HttpGrid has no _runtime_client any more"
    client = member("flwr.supercore.protobuf.client", "ProtobufClient")
    kinds = inspect.signature(client._unary_unary).parameters
    for name in ("path", "rpc_method", "request", "response_type"):
        assert kinds[name].kind is inspect.Parameter.KEYWORD_ONLY, f"_unary_unary has no {name} any more"
    for name in ("SerializeToString(deterministic=True)", "response_type()", ".ParseFromString("):
        assert name in inspect.getsource(client._unary_unary), "a request need be more than its bytes"


def test_messages_get_their_id_from_their_content() -> None:
    text = source("flwr.superlink.grid.http_grid")
    assert 'msg.metadata.__dict__["_message_id"] = msg.object_id' in text
    assert "with no_object_id_recompute():" in text


def test_own_processes_are_the_superlink_node() -> None:
    assert member("flwr.common.constant", "SUPERLINK_NODE_ID") == server.flower.grid._SUPERLINK_NODE


def test_waits_of_moving_objects_are_keyword_arguments() -> None:
    utils = "flwr.supercore.inflatable.inflatable_utils"
    pulls = inspect.signature(member(utils, "pull_objects")).parameters
    for name in ("initial_backoff", "backoff_cap", "max_concurrent_pulls"):
        assert pulls[name].kind is inspect.Parameter.KEYWORD_ONLY, f"pull_objects has no {name} any more"
    assert list(pulls)[:2] == ["object_ids", "pull_object_fn"]
    assert "max_concurrent_pushes" in parameters(member(utils, "push_objects"))


def test_runtime_ignores_the_run_that_an_object_request_names() -> None:
    for name in ("push_object", "pull_object", "confirm_message_received"):
        handler = member("flwr.superlink.servicer.runtime.runtime_handlers", name)
        assert parameters(handler) == ["request", "state", "task"]
        assert "request.run_id" not in inspect.getsource(handler), f"{name} needs the run's id"


def test_handlers_take_request_and_state() -> None:
    fleet = "flwr.superlink.servicer.fleet.fleet_handlers"
    assert parameters(member(fleet, "push_messages")) == ["request", "state"]
    for name in ("pull_messages", "confirm_message_received"):
        assert parameters(member(fleet, name)) == ["request", "state", "store"]
    runtime = "flwr.superlink.servicer.runtime.runtime_handlers"
    for name in ("push_messages", "pull_messages"):
        assert parameters(member(runtime, name)) == ["request", "state", "task"]


def test_fleet_handlers_do_no_more_with_objects_than_batches_do() -> None:
    """Batches keep and hand out objects themselves; a check that Flower adds must be added there."""
    fleet = "flwr.superlink.servicer.fleet.fleet_handlers"
    for name, calls in (
        ("push_object", {"check_abort", "state.store_object", "state.store_traffic"}),
        ("pull_object", {"check_abort", "state.get_object", "state.store_traffic"}),
    ):
        tree = ast.parse(inspect.getsource(member(fleet, name)))
        made = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        others = {call for call in made if call.split(".")[0] in ("state", "check_abort")} - calls
        assert not others, f"{name} does {others} too"


def test_node_and_task_are_authenticated_by_the_functions_that_batches_call() -> None:
    node = member("flwr.superlink.routers.fleet.node_auth", "authenticate_node")
    assert parameters(node) == ["request"]
    assert "request.state.protobuf_request" in inspect.getsource(node)
    task = member("flwr.supercore.dependencies.task", "authenticate_task")
    assert parameters(task) == ["request", "token", "state"]
    translator = member("flwr.supercore.error", "http_error_translator")
    assert parameters(translator) == ["request", "call_next"]


def test_link_state_has_what_batches_call() -> None:
    state = member("flwr.server.superlink.linkstate.in_memory_linkstate", "InMemoryLinkState")
    for name in ("get_node_id_by_public_key", "store_object", "get_object", "store_traffic"):
        assert callable(getattr(state, name, None)), f"the link state has no {name} any more"
    assert parameters(state.store_object) == ["self", "run_id", "session_id", "object_id", "object_content"]
    assert parameters(state.get_object) == ["self", "run_id", "object_id"]


def test_object_store_is_built_by_the_name_in_its_module() -> None:
    text = source("flwr.supercore.object_store.object_store_factory")
    assert "self.store_instance = InMemoryObjectStore()" in text, "objects on disk are not put in place"


def test_large_objects_lie_on_disk_and_go_with_their_message(tmp_path: Path) -> None:
    """Flower's own store, asked as Flower asks it; an object is a text with a head and a body."""
    folder = tmp_path / "objects"
    store = DiskObjectStore(folder)
    large = b"ArrayChunk  %d\0" % ON_DISK_BYTES + bytes(ON_DISK_BYTES)
    small = b"ArrayChunk  3\0abc"
    keys = [hashlib.sha256(content).hexdigest() for content in (large, small)]
    parent = b"ArrayRecord %s 0\0" % ",".join(keys).encode()
    root = hashlib.sha256(parent).hexdigest()
    tree_type = member("flwr.proto.message_pb2", "ObjectTree")
    tree = tree_type(object_id=root, children=[tree_type(object_id=key) for key in keys])
    assert set(store.preregister(1, tree)) == {root, *keys}
    assert store.get(keys[0]) == b"", "announced, and not there yet"
    assert store.open(keys[0]) is None
    for content, key in ((large, keys[0]), (small, keys[1]), (parent, root)):
        store.put(key, content)
        store.put(key, content)
    assert [store.get(key) for key in keys] == [large, small]
    assert [file.name for file in folder.iterdir()] == [keys[0]]
    assert (folder / keys[0]).stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700
    with pytest.raises(ValueError, match="does not match"):
        store.put(keys[0], small)
    assert [store.open(key) for key in (keys[1], root, "unknown")] == [None] * 3, "these are no files"
    opened = store.open(keys[0])
    assert opened is not None
    store.delete(root)
    assert list(folder.iterdir()) == []
    assert store.get(keys[0]) is None
    assert store.open(keys[0]) is None
    with opened:
        assert opened.read() == large, "what is being sent is sent to its end"
    DiskObjectStore(folder)


def test_what_is_on_its_way_has_no_name_and_leaves_room_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DiskObjectStore(tmp_path / "objects")
    with store.spool(1_000_000) as file:
        assert list((tmp_path / "objects").iterdir()) == []
        status = os.fstat(file.fileno())
        assert (status.st_mode & 0o777, status.st_size) == (0o600, 1_000_000)
        assert status.st_blocks * 512 >= 1_000_000, "its room is taken before its bytes arrive"
        assert file.write(b"ciphertext") == 10
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: usage._replace(free=RESERVED_BYTES + 10))
    store.spool(10).close()
    with pytest.raises(OSError, match="No space left"):
        store.spool(11)


def test_nodes_are_listed_with_the_time_of_their_activation() -> None:
    fields = member("flwr.proto.node_pb2", "NodeInfo").DESCRIPTOR.fields_by_name
    assert {"node_id", "last_activated_at"} <= set(fields), "NodeInfo lost the time of activation"


def test_task_identity_can_be_set_and_gives_messages_their_source() -> None:
    identity = member("flwr.supercore.task_identity", "TaskIdentity")
    saved = (identity._run_id, identity._node_id, identity._task_id)
    try:
        set_identity(7, 8)
        assert (identity.run_id, identity.node_id, identity.task_id) == (7, 8, 7)
        message = flwr.app.Message(flwr.app.RecordDict(), 9, "query.join")
        assert (message.metadata.run_id, message.metadata.src_node_id) == (7, 8)
    finally:
        identity._run_id, identity._node_id, identity._task_id = saved


# --- the owner's node ----------------------------------------------------------------------------------


def test_fleet_connection_takes_the_arguments_that_we_give() -> None:
    connect = member(FLEET, "http_request_response")
    expected = ["server_address", "insecure", "root_certificates", "authentication_keys", "max_retries"]
    assert parameters(connect)[:5] == expected, "http_request_response changed its arguments"


def test_fleet_connection_yields_eight_callbacks_in_this_order() -> None:
    function = next(
        node
        for node in ast.walk(ast.parse(source(FLEET)))
        if isinstance(node, ast.FunctionDef) and node.name == "http_request_response"
    )
    yields = [node.value for node in ast.walk(function) if isinstance(node, ast.Yield)]
    assert len(yields) == 1
    assert isinstance(yields[0], ast.Tuple)
    assert [ast.unparse(item) for item in yields[0].elts] == [
        "node.node_id",
        "receive",
        "send",
        "get_run",
        "get_fab",
        "pull_object",
        "push_object",
        "confirm_message_received",
    ], "http_request_response yields other callbacks, or in another order"


def test_callbacks_take_the_arguments_that_we_give() -> None:
    inner = {
        node.name: [argument.arg for argument in node.args.args]
        for node in ast.walk(ast.parse(source(FLEET)))
        if isinstance(node, ast.FunctionDef)
    }
    assert inner["receive"] == []
    assert inner["send"] == ["message", "object_tree", "clientapp_runtime"]
    assert inner["pull_object"] == ["run_id", "object_id"]
    assert inner["push_object"] == ["run_id", "session_id", "object_id", "contents"]
    assert inner["confirm_message_received"] == ["run_id", "object_id"]


def test_fleet_connection_builds_its_client_by_the_name_in_its_module() -> None:
    assert "with FleetHttpClient.from_server_address(" in source(FLEET), (
        "the client is built otherwise, so that it would not show the owner's certificate"
    )


def test_fleet_client_takes_a_tls_context() -> None:
    client = member(FLEET, "FleetHttpClient")
    taken = inspect.signature(client.__init__).parameters
    for name in ("interceptors", "verify", "retry_invoker"):
        assert name in taken, f"FleetHttpClient has no {name} any more"
        assert taken[name].kind is inspect.Parameter.KEYWORD_ONLY
    assert parameters(client.__init__)[1] == "base_url"
    expected = ["server_address", "insecure", "root_certificates", "interceptors", "retry_invoker"]
    assert parameters(client.from_server_address) == expected


def test_fleet_client_sends_by_the_http_client_that_is_replaced() -> None:
    """By one that keeps connections while an owner trains."""
    client = inspect.getsource(member("flwr.supercore.protobuf.client", "ProtobufClient"))
    assert "self._client = httpx.Client(" in client
    assert client.count("httpx.Client(") == 1
    assert "self._client.send(" in client
    assert "follow_redirects=True" in client, "the replaced client follows no redirects; was that needed?"


def test_fleet_connection_gives_up_by_the_name_in_its_module() -> None:
    assert "flwr_exit(" in source(FLEET), "a refused connection ends in another way than by flwr_exit"
    exit_source = inspect.getsource(member(FLEET, "flwr_exit"))
    assert "os._exit" in exit_source, "flwr_exit does not end the process any more; it need not be replaced"


def test_end_of_a_run_is_no_exception_but_a_base_exception() -> None:
    ended = member("flwr.supercore.run", "RunNotRunningException")
    assert issubclass(ended, BaseException)
    assert not issubclass(ended, Exception), "client.flower catches more than it needs to"


def test_objects_are_moved_by_the_functions_that_we_call() -> None:
    inflatable = "flwr.supercore.inflatable"
    for name in (
        "get_all_nested_objects",
        "get_object_tree",
        "iterate_object_tree",
        "no_object_id_recompute",
    ):
        member(f"{inflatable}.inflatable_object", name)
    push_objects = member(f"{inflatable}.inflatable_utils", "push_objects")
    assert parameters(push_objects)[:2] == ["objects", "push_object_fn"]
    assert "object_ids_to_push" in parameters(push_objects)
    inflate = member(f"{inflatable}.inflatable_utils", "inflate_object_from_contents")
    assert len(parameters(inflate)) >= 2
    member("flwr.app.message", "remove_content_from_message")


@pytest.mark.parametrize("size", [0, 100_000, LARGE_BLOB_BYTES])
def test_message_with_bytes_in_a_configuration_record_is_three_objects(size: int) -> None:
    """Each object costs requests of its own, so that a message must be few of them."""
    objects = _objects(to_record(b"body", bytes(size)))
    assert len(objects) == 3, f"a message is {sorted(objects)}, not a message, a record and its values"


def test_large_blob_is_cut_into_chunks() -> None:
    record = to_record(b"body", bytes(LARGE_BLOB_BYTES + 1))
    assert len(_objects(record)) > 3
    assert from_record(record) == (b"body", bytes(LARGE_BLOB_BYTES + 1))


def _objects(record: Any) -> dict[str, Any]:
    identity = member("flwr.supercore.task_identity", "TaskIdentity")
    saved = (identity._run_id, identity._node_id, identity._task_id)
    try:
        set_identity(1, 2)
        message = flwr.app.Message(record, 3, "query.join")
        return dict(
            member("flwr.supercore.inflatable.inflatable_object", "get_all_nested_objects")(message)
        )
    finally:
        identity._run_id, identity._node_id, identity._task_id = saved


def test_error_reply_carries_the_text_that_we_give() -> None:
    error = flwr.app.Error(
        member("flwr.common.constant", "ErrorCode").CLIENT_APP_RAISED_EXCEPTION, "FS-X-01"
    )
    assert error.reason == "FS-X-01"


def test_strategy_leaves_the_whole_run_to_start() -> None:
    strategy = importlib.import_module("flwr.serverapp.strategy").Strategy
    assert parameters(strategy.start)[:2] == ["self", "grid"], "Strategy.start changed its arguments"


# --- switches ------------------------------------------------------------------------------------------

READ_BY_OTHERS = {
    "RAY_USAGE_STATS_ENABLED": "Ray, which only simulations on a cluster use",
    "OMP_NUM_THREADS": "OpenMP, in PyTorch and in NumPy's libraries",
}


@pytest.mark.parametrize("name", sorted(set(FLOWER_ENVIRONMENT) - set(READ_BY_OTHERS)))
def test_switch_is_read_by_flower(name: str) -> None:
    """Find the place where the name, or the constant that holds it, is looked up in the environment."""
    texts = [file.read_text(encoding="utf-8") for file in ROOT.rglob("*.py")]
    constants = {name, f'"{name}"'}
    for text in texts:
        for node in ast.walk(ast.parse(text)) if name in text else ():
            if isinstance(node, ast.Assign) and name in ast.unparse(node.value):
                constants |= {ast.unparse(target) for target in node.targets}
    lookups = [f"{call}({constant}" for call in ("os.getenv", "environ.get") for constant in constants]
    lookups += [f"environ[{constant}" for constant in constants]
    assert any(lookup in text for text in texts for lookup in lookups), f"Flower does not read {name}"


def test_other_switches_are_known_to_be_for_others() -> None:
    assert set(READ_BY_OTHERS) <= set(FLOWER_ENVIRONMENT)
