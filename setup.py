"The package, as `settings.ini` describes it."
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
ini = ConfigParser(delimiters=['='])
ini.read(here/'settings.ini', encoding='utf8')
cfg = ini['DEFAULT']
readme = here/'README.md'
blob = cfg['git_url'] + '/blob/' + cfg['branch'] + '/'
raw = cfg['git_url'] + '/raw/' + cfg['branch'] + '/'


def long_description():
    "README.md with links that work on a package index, too: there they would lead nowhere relative to the page."
    text = readme.read_text(encoding='utf8') if readme.exists() else ''
    text = re.sub(r'(!\[[^\]]*\]\()(?!https?:|#)', r'\g<1>' + raw, text)
    return re.sub(r'(?<!!)(\[[^\]]*\]\()(?!https?:|#|!)', r'\g<1>' + blob, text)


pythons = ['3.10', '3.11', '3.12', '3.13']

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], license='Apache-2.0',
    long_description=long_description(),
    long_description_content_type='text/markdown',
    classifiers=['Intended Audience :: Developers', 'Programming Language :: Python :: 3']
        + [f'Programming Language :: Python :: {v}' for v in pythons],
    python_requires='>=' + cfg['min_python'],
    packages=find_packages(include=['vader_nb', 'vader_nb.*']),
    package_data={'vader_nb': cfg['package_data'].split()},
    install_requires=cfg['requirements'].split(),
    extras_require={'dev': cfg['dev_requirements'].split()},
    entry_points={'console_scripts': cfg['console_scripts'].split(),
                  'nbdev': ['vader_nb=vader_nb._modidx:d']},
)
