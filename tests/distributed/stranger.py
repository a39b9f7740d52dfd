"""Where exported folders are reloaded: a process that has imported what a stranger would, and forks one for each script.

A script runs there as in a new Python, only without the seconds that torch and transformers take to be imported. This
process has never imported the package. Real new processes are started by all runs that are not the harness's.
"""

import json
import os
import runpy
import select
import socket
import subprocess
import sys
import time
import traceback

ADDRESS = "PRUNADAPT_TEST_STRANGER"  # variable: the socket


def start(folder):
    """The process, which ends with this one; its address is in the environment of whatever is started from now on."""
    os.environ[ADDRESS] = f"{folder}/stranger"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, __file__, os.environ[ADDRESS]]
    return subprocess.Popen(command, stdin=subprocess.PIPE, cwd=folder, env=environment)


def run_script(script, arguments, environment, folder):
    """As `proof.run_script`."""
    while not os.path.exists(os.environ[ADDRESS]):  # it is still importing
        time.sleep(0.05)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ[ADDRESS])
        with connection.makefile("rw") as stream:
            stream.write(json.dumps([str(script), arguments, environment, str(folder)]) + "\n")
            stream.flush()
            code, said = json.loads(stream.readline())
    return subprocess.CompletedProcess([str(script), *arguments], code, "", said)


def serve(address):
    import peft  # noqa: F401
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification  # noqa: F401
    from transformers.models.bert import modeling_bert  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address + ".new")
        server.listen(16)
        os.rename(address + ".new", address)
        while True:
            ready, _, _ = select.select([server, sys.stdin], [], [], 1.0)
            while reaped():
                ...
            if sys.stdin in ready:  # whoever started this is gone
                return
            if server in ready:
                connection, _ = server.accept()
                with connection:
                    if os.fork() == 0:
                        try:
                            answer(connection, transformers)
                        finally:
                            os._exit(0)


def reaped():
    try:
        return os.waitpid(-1, os.WNOHANG)[0]
    except ChildProcessError:
        return 0


def answer(connection, transformers):
    """In a process of its own."""
    with connection.makefile("rw") as stream:
        script, arguments, environment, folder = json.loads(stream.readline())
        said = open(f"{folder}/stderr", "w+")  # noqa: SIM115
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        transformers.dynamic_module_utils.HF_MODULES_CACHE = environment["HF_MODULES_CACHE"]
        sys.argv, code = [script, *arguments], 0
        try:
            runpy.run_path(script, run_name="__main__")
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stderr.flush()
        said.seek(0)
        stream.write(json.dumps([code, said.read()]) + "\n")


if __name__ == "__main__":
    serve(sys.argv[1])
