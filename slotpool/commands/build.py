"""``slotpool build``."""

from __future__ import annotations

import argparse
import sys

import attr

from ..config import SlotPoolConfig


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "build",
        help="build the containers' image",
        description="Build the image of a sandbox server with docker. The build's output goes to standard error, the image's "
        "name to standard output.",
    )
    parser.set_defaults(run=run)
    default = attr.fields_dict(SlotPoolConfig)["image"].default
    parser.add_argument("--image", default=default, help="its name; default: %(default)s")
    parser.add_argument("--base", metavar="IMAGE", help="what to start from; default: the Dockerfile's")
    parser.add_argument("--dockerfile", metavar="F", help="default: slotpool's own")
    parser.add_argument("--context", metavar="DIR", help="where the Dockerfile copies from; default: slotpool's package")
    parser.add_argument(
        "--package",
        action="extend",
        nargs="+",
        default=[],
        metavar="NAME",
        help="Debian packages that slots are to have; repeatable",
    )


def run(args: argparse.Namespace) -> int:
    from ..fleet.nomad import image

    # The same messages as a pool's.
    checked = SlotPoolConfig(
        backend="local", image=args.image, dockerfile_path=args.dockerfile, docker_build_context=args.context
    )
    image.build(
        checked.image,
        base=args.base,
        dockerfile=checked.dockerfile_path,
        context=checked.docker_build_context,
        extra_packages=args.package,
        on_line=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(checked.image)
    return 0
