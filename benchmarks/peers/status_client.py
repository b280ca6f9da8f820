"""Asks for the status of a job again and again, over one connection a client. Prints the times as JSON.

    python status_client.py PROTOCOL CLIENTS SECONDS ADDRESS...

Standard library alone (and zmq for circus), as each tool's own Python runs it.
"""

import http.client
import json
import shlex
import subprocess
import sys
import threading
import time
from xmlrpc.client import ServerProxy


def http_asker(address):
    host, _, path = address.partition("/")
    connection = http.client.HTTPConnection(host)

    def ask():
        connection.request("GET", "/" + path)
        answer = connection.getresponse()
        assert b'"alive"' in answer.read()

    return ask


def xmlrpc_asker(address):
    host, worker = address.split()
    proxy = ServerProxy(f"http://{host}/RPC2")

    def ask():
        assert proxy.supervisor.getProcessInfo(worker)["pid"]

    return ask


def zmq_asker(address):
    import uuid

    import zmq

    where, worker = address.split()
    socket = zmq.Context.instance().socket(zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, uuid.uuid4().hex.encode())
    socket.connect(where)

    def ask():
        question = {"id": uuid.uuid4().hex, "command": "status", "properties": {"name": worker}}
        socket.send(json.dumps(question).encode())
        assert json.loads(socket.recv())["status"] == "active"

    return ask


def program_asker(address):
    argv = shlex.split(address)

    def ask():
        subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)

    return ask


ASKERS = {"http": http_asker, "xmlrpc": xmlrpc_asker, "zmq": zmq_asker, "program": program_asker}


def main(protocol, clients, seconds, address):
    times = []
    askers = [ASKERS[protocol](address) for _ in range(int(clients))]
    for ask in askers:
        ask()
    began = time.monotonic()
    stop_at = began + float(seconds)

    def client(ask):
        now = time.monotonic()
        while now < stop_at:
            since = now
            ask()
            now = time.monotonic()
            times.append(now - since)

    threads = [threading.Thread(target=client, args=(ask,)) for ask in askers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    json.dump({"times": sorted(times), "seconds": time.monotonic() - began}, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:4], " ".join(sys.argv[4:]))
