"""The hosts themselves: that they are joined and apart as told, and that nothing of them stays."""

import os
import subprocess
import sys
import textwrap

import pytest

from tests.core.helpers import is_alive, wait_until
from tests.hosts import netns
from tests.hosts.clusters import ROOT

pytestmark = [pytest.mark.skate, pytest.mark.slow]  # a namespace takes a tenth of a second to make


def reaches(one, other):
    """Whether the kernel of one answers another; ping is not everywhere."""
    program = f"import socket; socket.create_connection(({other.ip!r}, 9), timeout=0.5)"
    done = subprocess.run(one.argv(sys.executable, "-c", program), capture_output=True, text=True)
    return "ConnectionRefusedError" in done.stderr  # its kernel has answered


def test_a_cut_separates_hosts_and_a_mend_joins_them_again(hosts):
    one, other, third = hosts(3)
    assert reaches(one, other)
    assert reaches(third, one)
    one.cut()
    assert not reaches(one, other)
    assert not reaches(third, one)
    assert reaches(third, other)
    one.mend()
    wait_until(lambda: reaches(other, one), what="the mended link")


def test_two_hosts_can_lose_each_other_alone(hosts, packet_filter):
    one, other, third = hosts(3)
    one.block(other)
    assert not reaches(one, other)
    assert not reaches(other, one)
    assert reaches(one, third)
    one.heal()
    assert reaches(other, one)


def test_the_machine_s_own_network_is_not_touched(hosts):
    def network():
        return (
            netns.command("ip", "-o", "link"),
            netns.command("ip", "-4", "route"),
            netns.command("ip", "-o", "address"),
        )

    before = network()
    hosts(2)
    assert network() == before


def test_what_a_killed_run_has_left_is_removed_by_the_next(hosts):
    program = textwrap.dedent("""
        import subprocess
        from tests.hosts import netns
        net = netns.Net(2)
        sleeper = subprocess.Popen(net.hosts[0].argv("sleep", "1000"), stdout=subprocess.DEVNULL)
        print(net.name, sleeper.pid, flush=True)
        input()
    """)
    run = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    name, sleeper = run.stdout.readline().split()
    mine = [name for name in netns.names() if f"-{os.getpid()}-" in name]
    left = [each for each in netns.names() if each.startswith(name)]
    assert len(left) == 3
    netns.sweep()
    assert [each for each in netns.names() if each.startswith(name)] == left  # it still runs
    run.kill()
    run.communicate()
    netns.sweep()
    assert not [each for each in netns.names() if each.startswith(name)]
    assert [name for name in netns.names() if f"-{os.getpid()}-" in name] == mine
    assert not is_alive(int(sleeper))
