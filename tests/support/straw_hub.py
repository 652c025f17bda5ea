"""A hub of straw: repositories are lists of file names, and every request is written down."""

import types

from huggingface_hub import errors


class Straw:
    """An HfApi that keeps repositories as {name: file names} and writes down what it was asked."""

    def __init__(self, repos=(), fail=None):
        self.repos, self.fail, self.calls, self.commit = dict(repos), fail, [], 0

    def _log(self, name, **settings):
        self.calls.append((name, settings))
        if self.fail == name:
            raise ConnectionError("no route to host\nmore")

    def model_info(self, repo):
        self._log("model_info", repo=repo)
        if repo not in self.repos:
            raise errors.RepositoryNotFoundError(
                f"404 {repo}", response=types.SimpleNamespace(headers={}, request=None)
            )
        files = [types.SimpleNamespace(rfilename=name) for name in self.repos[repo]]
        return types.SimpleNamespace(siblings=files, sha=f"commit-{self.commit}")

    def create_repo(self, repo, private, exist_ok):
        self._log("create_repo", repo=repo, private=private, exist_ok=exist_ok)
        self.repos.setdefault(repo, [".gitattributes"])

    def upload_folder(self, repo_id, folder_path, commit_message, parent_commit):
        self._log("upload_folder", repo=repo_id, parent=parent_commit, message=commit_message)
        self.repos[repo_id] = sorted({*self.repos[repo_id], *(file.name for file in folder_path.iterdir())})
        return types.SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")
