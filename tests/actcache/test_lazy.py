import subprocess
import sys

from support.places import CHILD


def test_reading_imports_no_language_model():
    code = "import sys, actcache; actcache.Loader; print([m for m in ('transformers', 'datasets') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=CHILD)
    assert done.stdout.strip() == "[]", done.stderr
