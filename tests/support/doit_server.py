"""A process that runs doit in forked children, each in some 50 ms: everything is imported before.

It reads [folder, words of the command line] as a line of JSON, and answers with [exit code, output, whether dodo.py was
imported].
"""

import json
import os
import sys

from doit.doit_cmd import DoitMain

from build_tasks.doit_plugin import noop_record

MARK = "\0"


def main() -> None:
    noop_record.RECENT_NS = 0  # nobody edits the modules of this process
    for line in sys.stdin:
        folder, words = json.loads(line)
        receiver, sender = os.pipe()
        if (child := os.fork()) == 0:
            os.dup2(sender, 1)
            os.dup2(sender, 2)
            os.close(receiver)
            os.close(sender)
            os.chdir(folder)
            sys.argv = ["doit", *words]
            try:
                sys.exit(DoitMain().run(words))
            finally:
                sys.stdout.flush()
                os.write(1, MARK.encode() * ("dodo" in sys.modules))
        os.close(sender)
        with open(receiver, encoding="utf-8") as output:
            text = output.read()
        _, status = os.waitpid(child, 0)
        answer = os.waitstatus_to_exitcode(status), text.replace(MARK, ""), MARK in text
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
