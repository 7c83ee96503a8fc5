"""Everything about the package that is data stands in settings.ini; the metadata beside it is here."""

import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(HERE / "settings.ini", encoding="utf-8")
s = config["DEFAULT"]
name = s["lib_name"]
readme = HERE / "README.md"


class BuildWithNotebooks(build_py):
    """Jobs and explorers travel inside the package, in `notebooks/`, so that they run without a clone.

    They are copied into the build alone: in the source tree, and in an editable install, they stay in nbs/. So does the training
    diary, which reads the logs in benchmarks/results.
    """

    def notebooks(self):
        for folder in ("jobs", "explore"):
            for path in sorted((HERE / "nbs" / folder).glob("*.ipynb")):
                if path.stem != "training_diary": yield path, Path(self.build_lib, name, "notebooks", folder, path.name)

    def run(self):
        if not self.editable_mode:  # a module that an earlier build left behind would be packed again
            shutil.rmtree(Path(self.build_lib, name), ignore_errors=True)
        super().run()
        if not self.editable_mode:
            for source, target in self.notebooks():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)

    def get_outputs(self, include_bytecode=True):
        packed = [] if self.editable_mode else [str(target) for _, target in self.notebooks()]
        return super().get_outputs(include_bytecode) + packed


extras = {extra: s[f"{extra}_requirements"].split()
          for extra in ("notebooks", "train", "baselines", "urls", "cluster", "large", "coders")}
extras["dev"] = sorted({*extras["notebooks"], *extras["train"], *extras["urls"], *extras["cluster"],
                        *extras["large"], *s["dev_requirements"].split()})

setup(
    name=name,
    version=s["version"],
    description=s["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else s["description"],
    long_description_content_type="text/markdown",
    author=s["author"],
    author_email=s["author_email"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=s["keywords"].split(),
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Multimedia :: Graphics",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=f">={s['min_python']}",
    install_requires=s["requirements"].split(),
    extras_require=extras,
    packages=find_packages(include=[name, f"{name}.*"]),
    include_package_data=False,
    package_data={name: [f"models/**/*.{suffix}" for suffix in ("json", "safetensors", "md", "jpg")]},
    entry_points={"console_scripts": s["console_scripts"].split()},
    cmdclass={"build_py": BuildWithNotebooks},
    zip_safe=False,
)
