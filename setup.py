import os

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithDockerfile(build_py):
    """Puts the Dockerfile into the package, so that an installed slotpool can build its image too."""

    def run(self):
        super().run()
        if not getattr(self, "editable_mode", False):
            self.mkpath(os.path.dirname(self._dockerfile()))
            self.copy_file(os.path.join("docker", "Dockerfile"), self._dockerfile())

    def get_outputs(self, include_bytecode=1):
        return [*super().get_outputs(include_bytecode), self._dockerfile()]

    def _dockerfile(self):
        return os.path.join(self.build_lib, "slotpool", "docker", "Dockerfile")


setup(cmdclass={"build_py": BuildWithDockerfile})
