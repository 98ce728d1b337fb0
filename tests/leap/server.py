"""A service on this machine that speaks D-Wave's solver API (v3 media types) to the unmodified client.

The protocol is Python's standard library alone; what is uploaded is loaded by the libraries that made it and solved
by exhaustive or random search, so an answer is right only when the upload was. The service can be told to drop the
connection at any request (before or after it acts on it), to answer with an error, to be slow, and to let problems
fail. It counts requests and keeps every problem it accepted.
"""

import base64
import collections
import datetime
import functools
import hashlib
import http.server
import io
import itertools
import json
import re
import socket
import struct
import tempfile
import threading
import traceback
import urllib.parse
import uuid
import zlib

import dimod
import numpy as np

TOKEN = "the-token-that-nobody-may-see"  # noqa: S105
EXHAUSTIVE = 20_000
"""Up to so many states all are tried; of more, so many random ones."""

RUN_TIME_S = 3.0
"""What the service says a problem ran for, and charges."""


md5 = functools.partial(hashlib.md5, usedforsecurity=False)


class LeapServer:
    """The service; a context manager.

    Attributes:
        solvers: name → description, as the service publishes it.
        problems: id → what was accepted, in order.
        requests: (method, path) of every request, in order.
        drop_at: index of the request at which the connection is dropped; with ``drop_on`` all later ones, too.
        drop_after: the request is acted upon before the connection is dropped.
        errors: (method, start of the path) → (status, message) that is answered instead.
        outcome, message: what becomes of problems: COMPLETED, FAILED or CANCELLED, and why.
        pending: so many status requests are answered with PENDING.
    """

    def __init__(self, *solvers):
        self.solvers = {solver["identity"]["name"]: solver for solver in solvers}
        self.problems, self.requests, self.uploads, self.answers = {}, [], {}, {}
        self.drop_at, self.drop_on, self.drop_after = None, False, False
        self.errors, self.outcome, self.message, self.pending = {}, "COMPLETED", "", 0
        self.polls, self.failures = collections.Counter(), []
        self.lock = threading.RLock()
        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._http.daemon_threads, self._http.leap = True, self
        self.endpoint = f"http://127.0.0.1:{self._http.server_address[1]}/sapi/v2/"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.005,), daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()
        assert not self.failures, "\n".join(self.failures)

    def restart(self):
        """The network is sound again; what was stored is still there."""
        self.drop_at, self.drop_on, self.drop_after = None, False, False

    # --- what the requests do; each gives (status, kind of content, content) -----------------------------------------

    def act(self, method, path, query, body):
        routes = (
            ("GET", r"solvers/remote/?", self.list_solvers),
            ("GET", r"solvers/remote/([^/]+)/?", self.get_solver),
            ("POST", r"bqm/multipart", self.begin_upload),
            ("PUT", r"bqm/multipart/([^/]+)/part/(\d+)", self.take_part),
            ("GET", r"bqm/multipart/([^/]+)/status", self.upload_status),
            ("POST", r"bqm/multipart/([^/]+)/combine", self.combine),
            ("POST", r"problems/?", self.submit),
            ("GET", r"problems/?", self.list_problems),
            ("GET", r"problems/([^/]+)/?", self.get_problem),
            ("GET", r"answers/([^/]+)", self.get_answer),
        )
        for verb, pattern, action in routes:
            match = re.fullmatch(pattern, path)
            if verb == method and match:
                return action(*match.groups(), query=query, body=body)
        return 404, None, {"error_code": 404, "error_msg": f"nothing is at {path}"}

    def list_solvers(self, **_):
        return 200, "solver-definition-list", list(self.solvers.values())

    def get_solver(self, name, **_):
        if name not in self.solvers:
            return 404, None, {"error_code": 404, "error_msg": "no such solver"}
        return 200, "solver-definition", self.solvers[name]

    def begin_upload(self, body, **_):
        upload = str(uuid.uuid4())
        self.uploads[upload] = {"size": json.loads(body)["size"], "parts": {}, "whole": None}
        return 200, "", {"id": upload}

    def take_part(self, upload, number, body, **_):
        self.uploads[upload]["parts"][int(number)] = body
        return 200, "", {}

    def upload_status(self, upload, **_):
        parts = self.uploads[upload]["parts"]
        listed = [{"part_number": n, "checksum": md5(data).hexdigest()} for n, data in parts.items()]
        done = self.uploads[upload]["whole"] is not None
        return 200, "", {"status": "UPLOAD_COMPLETED" if done else "UPLOAD_IN_PROGRESS", "parts": listed}

    def combine(self, upload, body, **_):
        parts = [data for _, data in sorted(self.uploads[upload]["parts"].items())]
        digest = md5(b"".join(md5(data).digest() for data in parts)).hexdigest()
        assert digest == json.loads(body)["checksum"], "the client's checksum is another one"
        whole = b"".join(parts)
        assert len(whole) == self.uploads[upload]["size"]
        self.uploads[upload]["whole"] = whole
        return 200, "", {}

    def submit(self, body, **_):
        return 200, "problems", [self.accept(job) for job in json.loads(body)]

    def accept(self, job):
        problem = str(uuid.uuid4())
        now = datetime.datetime.now(datetime.UTC)
        later = now + datetime.timedelta(seconds=RUN_TIME_S + 2.0)  # two seconds in the queue
        times = {"submitted_on": now.isoformat(), "solved_on": later.isoformat()}
        self.problems[problem] = {**job, "id": problem, **times}
        return self.status(problem)

    def status(self, problem):
        known = self.problems[problem]
        waiting = self.polls[problem] < self.pending
        status = "PENDING" if waiting else self.outcome
        told = {name: known[name] for name in ("id", "type", "solver", "label", "submitted_on") if name in known}
        if not waiting:
            told["solved_on"] = known["solved_on"]
        if self.outcome == "FAILED":
            told["error_message"] = self.message
        return {**told, "status": status}

    def list_problems(self, query, **_):
        if "id" in query:
            found = [name for name in query["id"][0].split(",") if name in self.problems]
        else:
            found = [name for name, job in self.problems.items() if job.get("label") == query["label"][0]]
        statuses = [self.status(name) for name in found]
        self.polls.update(found)
        return 200, "problems", statuses

    def get_problem(self, problem, **_):
        if problem not in self.problems:
            return 404, None, {"error_code": 404, "error_msg": "no such problem"}
        told = self.status(problem)
        if told["status"] == "COMPLETED":
            told["answer"] = self.solved(problem)
        return 200, "problem", told

    def get_answer(self, problem, **_):
        return 200, "octet-stream", self.answers[problem]

    # --- solving what was uploaded -----------------------------------------------------------------------------------

    def upload_of(self, problem):
        return io.BytesIO(self.uploads[self.problems[problem]["data"]["data"]]["whole"])

    def solved(self, problem):
        job = self.problems[problem]
        timing = {"run_time": RUN_TIME_S * 1e6, "charge_time": RUN_TIME_S * 1e6, "qpu_access_time": 20_000.0}
        if job["type"] == "nl":
            if problem not in self.answers:
                self.answers[problem] = solve_nonlinear(self.upload_of(problem))
            answer = {"format": "binary-ref", "auth_method": "sapi-token", "timing": timing, "shape": {}}
            return answer | {"url": f"{self.endpoint}answers/{problem}"}
        if job["type"] == "ising":
            properties = self.solvers[job["solver"]["name"]]["properties"]
            reads, timing = job["params"].get("num_reads", 1), {"qpu_access_time": timing["qpu_access_time"]}
            return solve_embedded(job["data"], properties, reads) | {"timing": timing}
        samples = solve_cqm(self.upload_of(problem)) if job["type"] == "cqm" else solve_bqm(self.upload_of(problem))
        samples.info.update(timing)
        return {"format": "bq", "data": samples.to_serializable()}


class _Handler(http.server.BaseHTTPRequestHandler):
    def handle_one_request(self):
        try:
            super().handle_one_request()
        except ConnectionError:
            self.close_connection = True

    def do(self):
        leap = self.server.leap
        url = urllib.parse.urlsplit(self.path)
        path = url.path.removeprefix("/sapi/v2/")
        body = self.body()
        if self.headers.get("Content-Encoding") == "deflate":
            body = zlib.decompress(body)
        with leap.lock:
            index = len(leap.requests)
            leap.requests.append((self.command, path))
            drops = leap.drop_at is not None and (index == leap.drop_at or (leap.drop_on and index > leap.drop_at))
            if drops and not (leap.drop_after and index == leap.drop_at):
                return self.drop()
            try:
                status, kind, content = self.answer(path, urllib.parse.parse_qs(url.query), body)
            except Exception as error:  # shown by the test that runs into it
                leap.failures.append(f"{self.command} {path}: {traceback.format_exc()}")
                status, kind, content = 500, None, {"error_code": 500, "error_msg": repr(error)}
        if drops:
            return self.drop()
        return self.reply(status, kind, content)

    do_GET = do_POST = do_PUT = do  # noqa: N815

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def answer(self, path, query, body):
        leap = self.server.leap
        if self.headers.get("X-Auth-Token") != TOKEN:
            return 401, None, {"error_code": 401, "error_msg": "Invalid token or access denied"}
        for (method, start), (status, message) in leap.errors.items():
            if method == self.command and path.startswith(start):
                return status, None, {"error_code": status, "error_msg": message}
        return leap.act(self.command, path, query, body)

    def reply(self, status, kind, content):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        media = f"application/vnd.dwave.sapi.{kind}+json; version=3.0.0" if kind else "application/json"
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream" if kind == "octet-stream" else media)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)

    def drop(self):
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_):
        pass


# --- classical solvers of what the libraries load ------------------------------------------------------------------


def states(sizes):
    """All states of variables with so many values each, or many random ones: ``(n, variables)``."""
    if np.prod([float(size) for size in sizes]) <= EXHAUSTIVE:
        return np.array(list(itertools.product(*map(range, sizes)))).reshape(-1, len(sizes))
    return np.random.default_rng(0).integers(0, sizes, size=(EXHAUSTIVE // 10, len(sizes)))


def solve_cqm(file):
    """The best ten of all ways to take one variable of each discrete constraint."""
    cqm = dimod.ConstrainedQuadraticModel.from_file(file)
    order = list(cqm.variables)
    place = {variable: at for at, variable in enumerate(order)}
    groups = [[place[v] for v in cqm.constraints[label].lhs.variables] for label in cqm.discrete]
    free = sorted(set(range(len(order))) - {at for group in groups for at in group})
    picks = states([len(group) for group in groups] + [2] * len(free))
    samples = np.zeros((len(picks), len(order)), dtype=np.int8)
    for column, group in enumerate(groups):
        samples[np.arange(len(picks)), np.array(group)[picks[:, column]]] = 1
    samples[:, free] = picks[:, len(groups) :]
    found = dimod.SampleSet.from_samples_cqm((samples, order), cqm)
    best = np.lexsort((found.record.energy, ~found.record.is_feasible))[:10]
    return dimod.SampleSet(found.record[best], found.variables, dict(found.info), found.vartype)


def sample_quadratic(bqm, reads):
    """Exact when small, else steepest descent from random states; best first."""
    from dwave.samplers import SteepestDescentSolver

    if bqm.num_variables <= 14:
        found = dimod.ExactSolver().sample(bqm)
    else:
        found = SteepestDescentSolver().sample(bqm, num_reads=max(reads, 100), seed=0)
    return found.truncate(reads, sorted_by="energy")


def solve_bqm(file):
    return sample_quadratic(dimod.BinaryQuadraticModel.from_file(file), 10)


def solve_nonlinear(file):
    """The best state, as the file that a locked model writes."""
    from dwave.optimization import Model

    model = Model.from_file(file)
    (decision,) = model.iter_decisions()
    lows, highs = (np.array(bound, dtype=int) for bound in (decision.lower_bound(), decision.upper_bound()))
    count = decision.shape()[0]
    tried = np.broadcast_to(lows, (count,)) + states((np.broadcast_to(highs - lows, (count,)) + 1).tolist())
    with model.lock():
        model.states.resize(len(tried))
        for at, state in enumerate(tried):
            decision.set_state(at, state)
        worth = [(not model.feasible(at), float(model.objective.state(at))) for at in range(len(tried))]
        best = tried[worth.index(min(worth))]
        model.states.resize(1)
        decision.set_state(0, best)
        with model.states.to_file() as written, tempfile.TemporaryFile() as copy:
            copy.write(written.read())
            copy.seek(0)
            return copy.read()


def solve_embedded(data, properties, reads):
    """Ising samples of what is on the qubits, in the encoding of the quantum processor."""
    linear = np.frombuffer(base64.b64decode(data["lin"]), dtype="<f8")
    active = [qubit for qubit, bias in zip(properties["qubits"], linear, strict=True) if not np.isnan(bias)]
    on = set(active)
    couplers = [(u, v) for u, v in properties["couplers"] if u in on and v in on]
    quadratic = struct.unpack(f"<{len(couplers)}d", base64.b64decode(data["quad"]))
    biases = dict(zip(properties["qubits"], linear.tolist(), strict=True))
    couplings = {pair: bias for pair, bias in zip(couplers, quadratic, strict=True) if bias}
    bqm = dimod.BinaryQuadraticModel.from_ising({qubit: biases[qubit] for qubit in active}, couplings)
    found = sample_quadratic(bqm, reads)
    columns = [found.variables.index(qubit) for qubit in active]
    bits = np.packbits(found.record.sample[:, columns] > 0, axis=1)

    def encoded(array, kind):
        return base64.b64encode(np.asarray(array).astype(kind).tobytes()).decode()

    return {
        "format": "qp",
        "active_variables": encoded(active, "<i4"),
        "energies": encoded(found.record.energy, "<f8"),
        "num_occurrences": encoded(found.record.num_occurrences, "<i4"),
        "solutions": encoded(bits, "u1"),
        "num_variables": properties["num_qubits"],
    }
