"""What the workers do in `test_multi_process_harness.py`.

A file of its own that imports no TensorFlow, so that these workers start at once.
"""

import json
import os
import pathlib
import socket
import time

from tests.network import interface_bytes


def describe(word):
    config = tf_config()
    return {"word": word, "pid": os.getpid(), "task": config["task"], "cluster": config["cluster"]}


def fail_on_worker_1():
    index = task_index()
    print(f"worker {index} was here")
    if index == 1:
        raise ValueError("a mistake of worker 1")
    time.sleep(60)


def sleep(seconds):
    print("asleep", flush=True)
    time.sleep(seconds)
    return task_index()


def wait_for_second_life(directory):
    mark = pathlib.Path(directory, str(task_index()))
    if task_index() == 1 and not mark.exists():
        mark.touch()
        sleep(60)
    return "finished"


def send(count):
    """Worker 0 sends `count` bytes to worker 1 over TCP, both at their address in TF_CONFIG."""
    config = tf_config()
    host, port = config["cluster"]["worker"][1].split(":")
    before, start = interface_bytes(), time.monotonic()
    if config["task"]["index"] == 1:
        with socket.create_server((host, int(port))) as server:
            connection, _ = server.accept()
            with connection:
                while connection.recv(1 << 20):
                    pass
    else:
        with connect(host, int(port)) as connection:
            connection.sendall(bytes(count))
            connection.shutdown(socket.SHUT_WR)
            connection.recv(1)  # Returns when worker 1, which has read all, closes.
    return interface_bytes().since(before), time.monotonic() - start


def count_logical_devices():
    import tensorflow as tf  # Only here: the other functions do without.

    return len(tf.config.list_logical_devices("CPU"))


def tf_config():
    return json.loads(os.environ["TF_CONFIG"])


def task_index():
    return tf_config()["task"]["index"]


def connect(host, port):
    for _ in range(100):
        try:
            return socket.create_connection((host, port))
        except ConnectionRefusedError:
            time.sleep(0.1)
    raise TimeoutError(f"nobody listens on {host}:{port}")
