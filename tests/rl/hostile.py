"""Programs that do harm where they can: 500 of them, made from some patterns.

Each writes ESCAPED if it could do what it tried. `CANARY` is a file that it may not read, change or remove, `PORT` a
port of this machine at which somebody listens.
"""

FORKS = (
    "import os; os.fork()",
    "import os\nwhile True: os.fork()",
    "import os; [os.fork() for _ in range({n})]",
    "import os; os.forkpty()",
    "import os; os.posix_spawn('/bin/sh', ['sh', '-c', 'sleep {n}'], {{}})",
    "import os; os.system('sleep {n} &') == 0 or 1 / 0",
    "import subprocess; subprocess.Popen(['/bin/sleep', '{n}'])",
    "import multiprocessing; multiprocessing.Process(target=print).start()",
    "import threading; [threading.Thread(target=input).start() for _ in range({n})]",
    "import ctypes; 1 / (ctypes.CDLL(None).fork() >= 0)",
    "import ctypes; 1 / (ctypes.CDLL(None).syscall(56, 17, 0, 0, 0, 0) >= 0)",
    "import ctypes; 1 / (ctypes.CDLL(None).vfork() >= 0)",
    "import os; os.execv('/bin/echo', ['echo', 'ESCAPED'])",
)
FILES = (
    "open({canary!r}).read()",
    "open({canary!r}, 'w').write('{n}')",
    "open({canary!r}, 'a').write('{n}')",
    "import os; os.remove({canary!r})",
    "import os; os.rename({canary!r}, {canary!r} + '{n}')",
    "import os; os.chmod({canary!r}, 0)",
    "import os; os.truncate({canary!r}, 0)",
    "import os; os.link({canary!r}, {canary!r} + '{n}')",
    "import os; os.symlink('/etc', {canary!r} + '{n}')",
    "import os; os.mkdir({canary!r} + '{n}')",
    "import os; os.listdir('/')",
    "import os; os.open('/proc/self/mem', os.O_RDWR)",
    "import os; os.chdir('/tmp')",
    "import os; os.memfd_create('{n}')",
    "import os; os.pipe()",
    "import os; os.write(0, b'{n}' * 1000)",
    "import io; io.open('/etc/passwd')",
    "import sys; sys.modules['os'].open('/tmp/{n}', 65)",
    "import ctypes; 1 / (ctypes.CDLL(None).open({canary!r}.encode(), 1) >= 0)",
    "import ctypes; 1 / (ctypes.CDLL(None).syscall(2, {canary!r}.encode(), 0) >= 0)",
    "import ctypes; 1 / (ctypes.CDLL(None).syscall(425, {n}, 0) >= 0)",
)
NETWORK = (
    "import socket; socket.create_connection(('127.0.0.1', {port}))",
    "import socket; socket.socket(socket.AF_UNIX)",
    "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'{n}', ('127.0.0.1', {port}))",
    "import _socket; _socket.socket(2, 1)",
    "import urllib.request; urllib.request.urlopen('http://127.0.0.1:{port}/{n}')",
    "import ctypes; 1 / (ctypes.CDLL(None).socket(2, 1, 0) >= 0)",
    "import socket; socket.getaddrinfo('localhost', {port})[{n}]",
)
OTHERS = (
    "import os; os.kill(os.getppid(), 9)",
    "import os; os.kill({n}, 0)",
    "import os; os.killpg(0, 9)",
    "import os; os.kill(-1, 9)",
    "import os; os.setuid(0)",
    "import os; os.setsid()",
    "import os; os.nice(-{n})",
    "import os; os.getppid() or 1; os.ptsname({n})",
    "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "import ctypes; 1 / (ctypes.CDLL(None).ptrace(16, 1, 0, 0) >= 0)",
    "import ctypes; 1 / (ctypes.CDLL(None).prctl(22, 0, 0, 0, 0) == 0)",
    "import ctypes; 1 / (ctypes.CDLL(None).prctl(1, 0, 0, 0, 0) == 0)",
    "import ctypes; 1 / (ctypes.CDLL(None).mount(b'/', b'/mnt', b'', 4096, 0) == 0)",
    "import ctypes; 1 / (ctypes.CDLL(None).unshare({n}) == 0)",
    "import pwd; pwd.getpwuid(0)",
    "import this_module_does_not_exist_{n}",
)
MEMORY = (
    "x = [0] * {n}0000000",
    "x = bytearray({n} << 30)",
    "x = 'x' * ({n} << 30)",
    "x = 10 ** (10 ** 10)",
    "x = []\nwhile True: x.append(x[:] + [0] * {n})",
    "import mmap; mmap.mmap(-1, {n} << 30)",
    "f = lambda: f()\nimport sys; sys.setrecursionlimit(10**9); f()",
    "x = eval('(' * {n}0000 + ')' * {n}0000)",
    "x = [bytearray(1 << 20) for _ in range({n}000)]",
)
ENDLESS = (
    "while True: pass",
    "import time; time.sleep({n}00)",
    "x = {n}\nwhile True: x = x * x % 1000003",
    "import itertools; sum(itertools.count({n}))",
    "while True:\n    try: 1 / 0\n    except BaseException: pass",
    "import re; re.match('(a+)+b', 'a' * {n}0)",
    "import signal\nfor s in {{*range(1, 32)}} - {{9, 19}}: signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
    "import threading; threading.Event().wait()",
    "import os\nos.close(1); os.close(2)\nwhile True: pass",
    "class A:\n    def __del__(self):\n        while True: pass\na = A(); del a",
)
OUTPUT = ("while True: print('x' * {n}00)", "import os\nwhile True: os.write(1, b'x' * {n}0000)")


def programs(canary: str, port: int, count: int) -> list[tuple[str, str]]:
    """Returns `count` pairs (kind, program); the first of each kind come first."""
    kinds = {"fork": FORKS, "files": FILES, "network": NETWORK, "others": OTHERS, "memory": MEMORY, "endless": ENDLESS}
    patterns = [(kind, text) for kind, texts in (kinds | {"output": OUTPUT}).items() for text in texts]
    found = []
    for n in range(count):
        kind, text = patterns[n % len(patterns)]
        body = text.format(n=12 + 7 * (n // len(patterns)), canary=canary, port=port)
        found.append((kind, f"{body}\nprint('ESCAPED')"))
    return found
