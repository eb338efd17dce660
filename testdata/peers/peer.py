# -*- coding: utf-8 -*-
"""XML-RPC interoperability peer for picket's tests: Python's own library.

One source for Python 2.7 and 3.6 or newer, standard library only:

    python peer.py caller URL   calls the agent at URL and prints one line
                                "NAME RESULT" for each call; exit status 1 if
                                any answer was not the expected one
    python peer.py monitor      serves on a free port of 127.0.0.1, prints
                                "listening URL", then for each call of
                                cmd_store_probe_data a line
                                "stored TYPE TICKET CODE VALUE TIME" (or
                                "bad ..."); ends at the end of standard input
                                and on SIGTERM

TYPE is "int" or "string"; this library cannot tell an i8 from an int, and
cannot send one either, so the caller has no line "i8".
"""
import os
import signal
import socket
import sys
import threading

try:
    import xmlrpc.client as xmlrpc
    from xmlrpc.server import SimpleXMLRPCRequestHandler, SimpleXMLRPCServer
except ImportError:
    import xmlrpclib as xmlrpc
    from SimpleXMLRPCServer import SimpleXMLRPCRequestHandler, SimpleXMLRPCServer

TEXT = (str, type(u""))
INTEGER = (int, type(2 ** 64))


def say(line):
    """Prints a line as UTF-8, whatever the locale and the Python."""
    data = line if isinstance(line, bytes) else line.encode("utf-8")
    out = getattr(sys.stdout, "buffer", sys.stdout)
    out.write(data + b"\n")
    out.flush()


def expect_ok(value):
    if type(value) not in TEXT or value != "OK":
        raise ValueError("unexpected result %r" % (value,))
    return value


def caller(url):
    socket.setdefaulttimeout(10)
    agent = xmlrpc.ServerProxy(url, allow_none=True)
    submit = agent.cmd_submit_reading

    def multicall():
        batch = xmlrpc.MultiCall(agent)
        batch.healthcheck()
        getattr(batch, "no.such.method")()
        answers, parts = batch(), []
        for i in range(2):
            try:
                parts.append(expect_ok(answers[i]))
            except xmlrpc.Fault as fault:
                parts.append("fault %d" % fault.faultCode)
        return " ".join(parts)

    def methods():
        return len([m for m in agent.system.listMethods() if m.startswith("cmd_")])

    calls = [
        ("healthcheck", "OK", lambda: expect_ok(agent.healthcheck())),
        ("array", "OK", lambda: expect_ok(submit(7, "words", ["one", "two three"]))),
        ("string", "OK", lambda: expect_ok(submit("t-8", "words", "one 'two three'"))),
        ("nil", "OK", lambda: expect_ok(submit(9, "words", None))),
        ("none", "OK", lambda: expect_ok(submit(10, "words"))),
        ("utf8", "OK", lambda: expect_ok(submit(11, "words", [u"gr\u00fcn", "<&>\"'"]))),
        ("method", "fault -32601", lambda: getattr(agent, "no.such.method")()),
        ("params", "fault -32602", lambda: submit(7)),
        ("sensors", None, lambda: " ".join(sorted(agent.cmd_list_sensors().keys()))),
        ("multicall", "OK fault -32601", multicall),
        ("methods", None, methods),
    ]
    failed = False
    for name, expected, call in calls:
        try:
            result = u"%s" % (call(),)
            if expected not in (None, result):
                failed, result = True, "error unexpected result " + result
        except xmlrpc.Fault as fault:
            result = "fault %d" % fault.faultCode
            failed = failed or result != expected
        except Exception as error:  # whatever it is, it belongs on this line
            failed, result = True, "error %s: %s" % (type(error).__name__, error)
        say(name + " " + result)
    return 1 if failed else 0


class Handler(SimpleXMLRPCRequestHandler):
    rpc_paths = ()  # any path


def store(*params):
    try:
        ticket, (code, value), time = params
        kind = "int" if type(ticket) in INTEGER else "string"
        if kind == "string" and type(ticket) not in TEXT:
            raise ValueError("ticket %r" % (ticket,))
        if type(code) not in INTEGER:
            raise ValueError("code %r" % (code,))
        if type(value) not in TEXT:
            raise ValueError("value %r" % (value,))
        if not isinstance(time, xmlrpc.DateTime):
            raise ValueError("time %r" % (time,))
    except (TypeError, ValueError) as error:
        say("bad %s" % error)
        raise xmlrpc.Fault(400, "bad %s" % error)
    say(u"stored %s %s %d %s %s" % (kind, ticket, code, value, time.value))
    return "OK"


def monitor():
    def until_end_of_input():
        while os.read(0, 4096):
            pass
        os._exit(0)

    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    server = SimpleXMLRPCServer(("127.0.0.1", 0), Handler, logRequests=False)
    server.register_function(lambda: "OK", "healthcheck")
    server.register_function(store, "cmd_store_probe_data")
    watcher = threading.Thread(target=until_end_of_input)
    watcher.daemon = True
    watcher.start()
    say("listening http://127.0.0.1:%d/xmlrpc/" % server.server_address[1])
    server.serve_forever()


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "caller":
        sys.exit(caller(sys.argv[2]))
    if len(sys.argv) == 2 and sys.argv[1] == "monitor":
        sys.exit(monitor())
    sys.exit("usage: peer.py caller URL | peer.py monitor")
