"""A node of a cluster, started as `ray start` would: `node_program.py ARGUMENTS`, a JSON object.

Prints a line of JSON with what was started, and ends the node when its input ends. The token is in `RAY_AUTH_TOKEN`.
"""

import json
import sys

from ray._runtime import nodes, token
from ray._runtime.labels import check_labels
from ray._runtime.resources import node_resources


def main() -> int:
    arguments = json.loads(sys.argv[1])
    amounts = node_resources(
        arguments.get("num_cpus", 1), 0, arguments.get("resources"), 80 << 20, None, caller="node_program"
    )
    head = arguments.get("head")
    process = nodes.start(
        token=token.find(),
        amounts=amounts,
        ip=arguments["ip"],
        head=nodes.HeadFacts(*head) if head else None,
        listen=f"{arguments['ip']}:0",
        name=arguments.get("name", ""),
        labels=check_labels(arguments.get("labels"), "node_program"),
        outbound_only=arguments.get("outbound_only", False),
        findable=True,
    )
    started = {
        "node": process.node,
        "pid": process.pid,
        "address": process.tcp_address,
        "session_dir": process.session_dir,
    }
    print(json.dumps(started), flush=True)
    sys.stdin.read()
    process.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
