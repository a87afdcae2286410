"""`ray start`: heads and joiners as processes of their own, who may join, and what is said about it."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from tests.core.helpers import is_alive, listening, processes_with, wait_until
from tests.scripts.conftest import MARK, address_in, is_listening, pid_in, token_file_in

pytestmark = [pytest.mark.skate, pytest.mark.slow]  # each starts nodes and interpreters

NODES = """
import json, sys, ray
with ray.init(*sys.argv[1:], log_to_driver=False):
    print(json.dumps([[node["NodeName"], node["Resources"], node["Labels"]] for node in ray.nodes() if node["Alive"]]))
"""

SQUARES = """
import ray
with ray.init(log_to_driver=False) as context:
    print(context["address"], ray.get([ray.remote(lambda x=x: x * x).remote() for x in range(4)]))
"""

BLOCKS = """
import numpy as np, ray
with ray.init(log_to_driver=False):
    block = np.arange(1 << 20)
    total = ray.remote(lambda block: int(block.sum()))
    twice = ray.remote(lambda block: block * 2)
    print(ray.get(total.remote(ray.put(block))), int(ray.get(twice.remote(block)).sum()))
"""


def test_a_head_serves_and_says_how_to_join_connect_and_stop(user):
    text = user.succeed("start", "--head", f"--node-ip-address={user.ip}", "--num-cpus=1")
    address = f"{user.ip}:6379"
    assert address_in(text) == address
    file = token_file_in(text)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert file.read_text().strip() not in text
    assert f"\n  ray start --address={address}\n" in text
    assert f'\n  ray.init("{address}")\n' in text
    assert f"RAY_ADDRESS={address}" in text
    assert "\n  ray stop" in text

    answer = f"{address} [0, 1, 4, 9]"
    assert user.run(SQUARES) == answer
    assert user.run(SQUARES.replace("ray.init(", f'ray.init("{address}", ')) == answer
    assert user.run(SQUARES.replace("ray.init(", 'ray.init("auto", ')) == answer
    assert user.run(SQUARES, RAY_ADDRESS=address) == answer
    assert user.run(SQUARES.replace("ray.init(", 'ray.init("localhost:6379", ')) == answer

    assert user.succeed("stop") == "Stopped 1 node.\n"
    assert not is_listening(address)
    user.expect_nothing()


def test_the_text_for_other_machines_passes_the_tokens_file_and_not_the_token():
    from ray.scripts.words import head_started

    class Head:
        pid, session_dir, tcp_address = 7, "/d", "10.0.0.1:6379"

    facts = {"node_id": "ab" * 28, "why": "", "is_everywhere": False, "token_source": "", "any_port": False}
    text = head_started(Head(), token_file="/d/token", **facts)
    assert "\n  scp -p 10.0.0.1:/d/token ray-token\n" in text
    assert "\n  ray start --address=10.0.0.1:6379 --token-file=ray-token\n" in text
    Head.tcp_address = "127.0.0.1:6379"
    assert "scp" not in head_started(Head(), token_file="/d/token", **facts)


def test_nodes_of_one_machine_join_by_the_address_alone_and_have_what_was_asked_for(user, tmp_path):
    address = user.start_head('--resources={"special": 2}', "--node-name=first")
    labels = tmp_path / "labels.json"
    labels.write_text('{"zone": "a", "disk": "ssd"}')
    for name in ("second", "third"):
        text = user.succeed(
            "start",
            f"--address={address}",
            "--num-cpus=2",
            "--num-gpus=0",
            "--memory=100000000",
            "--object-store-memory=80000000",
            f"--node-name={name}",
            "--labels=zone=b,kind=large",
            f"--labels-file={labels}",
        )
        assert f"the cluster at {address}" in text
        assert f'ray.init("{address}")' in text
        assert address_in(text).startswith("127.0.0.1:")  # by which 127/8 is reached
    nodes = {name: (resources, labels) for name, resources, labels in json.loads(user.run(NODES))}
    assert list(nodes) == ["first", "second", "third"]
    assert nodes["first"][0]["special"] == 2
    resources, given = nodes["third"]
    assert (resources["CPU"], resources["memory"], resources["object_store_memory"]) == (2, 100000000, 80000000)
    assert {name: given[name] for name in ("zone", "disk", "kind")} == {"zone": "b", "disk": "ssd", "kind": "large"}
    assert user.succeed("stop") == "Stopped 3 nodes.\n"


def test_nobody_joins_without_the_token(user, new_user):
    text = user.succeed("start", "--head", f"--node-ip-address={user.ip}", "--num-cpus=1")
    address, file = address_in(text), token_file_in(text)
    other = new_user()
    join = ("start", f"--address={address}", "--num-cpus=1")

    assert "takes nobody without its token, and none was given" in other.fail(*join)
    refused = other.fail(*join, f"--token={'ab' * 32}")
    assert "does not accept the token" in refused
    assert "ray get-auth-token" in refused
    assert "RAY_AUTH_TOKEN is not a cluster token" in other.fail(*join, RAY_AUTH_TOKEN="short")
    assert "cannot be read" in other.fail(*join, "--token-file=/nonexistent")
    assert other.sessions() == []

    token = file.read_text().strip()
    other.succeed(*join, f"--token-file={file}")
    other.succeed(*join, RAY_AUTH_TOKEN=token)
    other.succeed(*join, RAY_AUTH_TOKEN_PATH=str(file))
    assert len(json.loads(user.run(NODES))) == 4
    assert other.succeed("stop") == "Stopped 3 nodes.\n"
    assert is_listening(address)
    user.succeed("stop")


@pytest.mark.parametrize("by_variable", [False, True])
def test_tls_is_one_flag_of_the_head_and_who_joins_needs_only_the_token(user, new_user, by_variable):
    flag, variables = ((), {"RAY_USE_TLS": "1"}) if by_variable else (("--tls",), {})
    text = user.succeed(
        "start", "--head", "--port=0", f"--node-ip-address={user.ip}", "--num-cpus=1", *flag, **variables
    )
    assert "Nodes use TLS 1.3 between them" in text
    address, token = address_in(text), token_file_in(text).read_text().strip()
    friend = new_user()
    joined = friend.succeed(
        "start", f"--address={address}", f"--node-ip-address={friend.ip}", "--num-cpus=1", RAY_AUTH_TOKEN=token
    )
    assert "Nodes use TLS 1.3 between them" in joined
    assert friend.run(SQUARES) == f"{address} [0, 1, 4, 9]"
    outsider = new_user()
    entry = {"RAY_ADDRESS": address, "RAY_AUTH_TOKEN": token}
    assert outsider.run(SQUARES, **entry) == f"{address} [0, 1, 4, 9]"
    total = sum(range(1 << 20))
    assert outsider.run(BLOCKS, **entry) == f"{total} {2 * total}"
    for each in (friend, user):
        each.succeed("stop")


def test_a_machine_that_nobody_can_connect_to_joins_and_listens_nowhere(user, new_user):
    text = user.succeed("start", "--head", "--port=0", f"--node-ip-address={user.ip}", "--num-cpus=1", "--tls")
    address, token = address_in(text), token_file_in(text).read_text().strip()
    friend = new_user()
    joined = friend.succeed("start", f"--address={address}", "--outbound-only", "--num-cpus=1", RAY_AUTH_TOKEN=token)
    assert address_in(joined) == "none"
    assert "listens for nobody and only connects outwards" in joined
    assert f"through {address}" in joined
    assert listening(pid_in(joined)) == []
    assert listening(pid_in(text)) != []
    # Tasks of either run on both.
    total = sum(range(1 << 20))
    for each in (user, friend):
        assert each.run(SQUARES) == f"{address} [0, 1, 4, 9]"
        assert each.run(BLOCKS) == f"{total} {2 * total}"
    [line] = [line for line in user.succeed("status").splitlines() if "outbound only" in line]
    assert "alive" in line
    # A program on a machine without a node.
    outsider = new_user()
    entry = {"RAY_ADDRESS": address, "RAY_AUTH_TOKEN": token, "RAY_OUTBOUND_ONLY": "1"}
    shown = "ray.get([ray.remote(lambda x=x: x * x).remote() for x in range(4)])"
    program = SQUARES.replace(shown, f"{shown}, [node['IsOutboundOnly'] for node in ray.nodes()]")
    assert outsider.run(program, **entry) == f"{address} [0, 1, 4, 9] [False, True, True]"
    assert outsider.run(BLOCKS, **entry) == f"{total} {2 * total}"
    for each in (friend, user):
        each.succeed("stop")


def test_a_head_with_tls_and_records_is_found_at_whichever_of_its_addresses_answers(user, tmp_path):
    address = user.start_head("--tls", f"--state=sqlite://{tmp_path}/records.db")
    nobody = f"{user.ip}:1"
    joined = user.succeed("start", f"--address={nobody},{address}", "--num-cpus=1")
    assert "Nodes use TLS 1.3 between them" in joined
    assert user.run(SQUARES) == f"{address} [0, 1, 4, 9]"
    assert user.succeed("stop") == "Stopped 2 nodes.\n"


def test_who_insists_on_tls_joins_no_cluster_without(user, new_user):
    address = user.start_head()
    other = new_user()
    token = {"RAY_AUTH_TOKEN": user.succeed("get-auth-token").strip()}
    join = ("start", f"--address={address}", f"--node-ip-address={other.ip}")
    for said in (other.fail(*join, "--tls", **token), other.fail(*join, RAY_USE_TLS="1", **token)):
        assert "uses TLS, and the cluster's nodes do not" in said
        assert address in said
    assert "RAY_USE_TLS='maybe'" in other.fail(*join, RAY_USE_TLS="maybe", **token)
    user.succeed("stop")


def test_a_node_of_another_python_is_refused_in_words(user, tmp_path):
    address = user.start_head()
    # What the joiner's process says of itself, from where every interpreter looks at its start.
    (tmp_path / "sitecustomize.py").write_text(
        "import ray._node.config as config\nconfig.python_version = lambda: '3.99.0'\n"
    )
    said = user.fail("start", f"--address={address}", "--num-cpus=1", PYTHONPATH=str(tmp_path))
    assert "it runs Python 3.99.0 and the head 3." in said
    assert len(user.sessions()) == 1
    user.succeed("stop")


def test_a_token_that_the_user_has_is_the_clusters(user):
    token = "cd" * 32
    given = user.succeed("get-auth-token", "--generate").strip()
    file = user.home / ".ray" / "auth_token"
    assert file.read_text().strip() == given
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    text = user.succeed("start", "--head", "--port=0", f"--node-ip-address={user.ip}", "--num-cpus=1")
    assert str(file) in text
    assert user.succeed("get-auth-token").strip() == given
    named = user.start_head(f"--token={token}")
    assert user.succeed("get-auth-token").strip() == token
    assert user.succeed("get-auth-token", f"--address={address_in(text)}").strip() == given
    assert user.succeed("get-auth-token", f"--address={named}").strip() == token
    assert user.succeed("stop") == "Stopped 2 nodes.\n"


def test_get_auth_token_says_when_there_is_none(user):
    assert "--generate" in user.fail("get-auth-token")
    assert not (user.home / ".ray").exists()


def test_a_taken_port_is_named_with_what_to_do(user, new_user):
    address = user.start_head()
    port = address.rpartition(":")[2]
    again = ("start", "--head", f"--port={port}", f"--node-ip-address={user.ip}", "--num-cpus=1")
    mine = user.fail(*again)
    assert f"port {port} of {user.ip} is taken by your own node" in mine
    assert "--port" in mine
    other = new_user()
    assert f"port {port} of {user.ip} is taken by another program" in other.fail(*again)
    assert other.sessions() == []
    second = user.start_head()
    assert second != address
    assert len(json.loads(user.run(NODES.replace("sys.argv[1:]", f'["{address}"]')))) == 1
    assert user.succeed("stop") == "Stopped 2 nodes.\n"


def test_a_node_in_another_directory_is_found_as_well(user, tmp_path):
    elsewhere = user.base.parent / "elsewhere"
    address = user.start_head(f"--temp-dir={elsewhere}")
    assert len(list(elsewhere.glob("session_*/logs/node.log"))) == 1
    assert user.sessions() == []
    assert user.run(SQUARES).startswith(address)
    assert user.succeed("stop") == "Stopped 1 node.\n"
    assert list(elsewhere.iterdir()) == []
    assert "too long" in user.fail("start", "--head", "--port=0", f"--temp-dir={elsewhere}/{'x' * 100}")


def test_a_node_that_sigterm_ends_leaves_nothing(user):
    text = user.succeed("start", "--head", "--port=0", f"--node-ip-address={user.ip}", "--num-cpus=1")
    os.kill(pid_in(text), 15)
    user.expect_nothing()


def test_a_node_that_loses_its_head_ends_and_its_log_says_why(user, new_user):
    text = user.succeed("start", "--head", "--port=0", f"--node-ip-address={user.ip}", "--num-cpus=1")
    other = new_user()
    with other.staying(f"--address={address_in(text)}", f"--token-file={token_file_in(text)}") as staying:
        user.succeed("start", f"--address={address_in(text)}", "--num-cpus=1")
        os.kill(pid_in(text), 9)
        _, errors = staying.communicate(timeout=20)
        assert staying.returncode == 1
        assert "has ended by itself, because the connection to the head was lost" in errors
    wait_until(lambda: not processes_with(MARK, user.mark), what="the end of the cluster")
    logs = [path.read_text() for path in user.base.glob("session_*/logs/node.log")]
    assert len(logs) == 2
    assert sum("ending: the connection to the head was lost" in log for log in logs) == 1
    for each in (user, other):
        remove_logs(each.base)


def remove_logs(base: Path):
    """What crashed nodes leave on purpose."""
    from ray._node import registry, session

    for path in base.glob("session_*"):
        session.remove(str(path))
    for path in base.glob("nodes/*"):
        registry.remove(str(path))


@pytest.mark.parametrize("number", [2, 15])
def test_a_command_that_stays_ends_its_node_when_it_is_told_to_end(user, number):
    with user.staying("--head", "--port=0", f"--node-ip-address={user.ip}") as staying:
        address = address_in(staying.text)
        assert user.run(SQUARES).startswith(address)
        staying.send_signal(number)
        output, errors = staying.communicate(timeout=20)
        assert (staying.returncode, errors) == (0, "")
        assert "was stopped" in output
        user.expect_nothing()


def test_a_command_that_stays_ends_well_when_its_node_is_stopped(user):
    with user.staying("--head", "--port=0", f"--node-ip-address={user.ip}") as staying:
        assert user.succeed("stop") == "Stopped 1 node.\n"
        staying.communicate(timeout=20)
        assert staying.returncode == 0


def test_a_command_that_stays_fails_and_says_why_when_its_node_crashes(user):
    with user.staying("--head", "--port=0", f"--node-ip-address={user.ip}") as staying:
        os.kill(pid_in(staying.text), 9)
        _, errors = staying.communicate(timeout=20)
        assert staying.returncode == 1
        assert "has ended by itself: it was killed by SIGKILL" in errors
    remove_logs(user.base)


def test_a_node_does_not_outlive_the_command_that_stays(user):
    with user.staying("--head", "--port=0", f"--node-ip-address={user.ip}") as staying:
        pid = pid_in(staying.text)
        staying.kill()
        wait_until(lambda: not is_alive(pid), what="the end of the node")


def test_options_that_do_not_fit_together_are_refused(user):
    for arguments, text in [
        (["start"], "--head, or joins one with --address"),
        (["start", "--head", "--address=127.0.0.1:1"], "not both"),
        (["start", "--head", "--token=a", "--token-file=b"], "give one of them"),
        (["start", "--head", "--outbound-only"], "through the head, which must be reachable"),
        (["start", "--address=127.0.0.1:1", "--outbound-only", "--port=7"], "listens for nobody"),
    ]:
        done = user.ray(*arguments)
        assert done.returncode == 2
        assert text in done.stderr
    for arguments, text in [
        (["--head", "--resources=[1]"], "--resources is to be JSON"),
        (["--head", '--resources={"CPU": 1}'], "num_cpus"),
        (["--head", "--labels=a"], "KEY=VALUE"),
        (["--head", "--labels-file=/nonexistent"], "cannot be read"),
        (["--head", "--num-cpus=-1"], "num_cpus"),
        (["--head", "--node-ip-address=no.such.host.invalid"], "is no address"),
        (["--head", "--node-ip-address=0.0.0.0"], "leads nowhere"),
        (["--address=127.0.0.1"], "HOST:PORT"),
        (["--address=127.0.0.1:1", f"--token={'ab' * 32}"], "no node could be reached"),
        (["--address=auto"], "no running cluster was found"),
    ]:
        assert text in user.fail("start", *arguments), arguments


def test_obsolete_options_are_taken_with_a_warning(user):
    done = user.ray(
        "start", "--head", "--port=0", f"--node-ip-address={user.ip}", "--num-cpus=1", "--redis-password=x",
        "--dashboard-host=0.0.0.0", "--dashboard-port=8265", "--include-dashboard=false", "--disable-usage-stats",
        "--min-worker-port=10002",
    )  # fmt: skip
    assert done.returncode == 0
    warnings = done.stderr.splitlines()
    assert len(warnings) == 3
    assert "--redis-password had no effect" in warnings[0]
    assert "--min-worker-port had no effect: a node has one TCP port" in warnings[1]
    assert "--dashboard-host, --dashboard-port had no effect: there is no dashboard yet" in warnings[2]
    user.succeed("stop")
