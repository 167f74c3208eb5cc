"""What a script does around its seconds of imports; to be imported before them, and quick itself."""

import signal
import warnings

# CompressAI imports torch_geometric, which still decorates with torch.jit.script: nothing that a user here can act on.
warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)


def before_imports() -> None:
    """Ctrl-C ends the process, without tracebacks from the midst of them. (Where it is ignored, as a shell lets its background
    jobs do, it stays so.)"""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def after_imports() -> None:
    """Ctrl-C raises KeyboardInterrupt, as ever."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
