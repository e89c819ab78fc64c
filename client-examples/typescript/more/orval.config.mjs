// One client with fetch, which is told the daemon by each call (fetcher.ts), and zod schemas for all answers.
const input = "../../../openapi/v1.json";
export default {
  api: {
    input,
    output: {
      target: "generated/orval/api.ts",
      client: "fetch",
      mode: "single",
      override: { mutator: { path: "fetcher.ts", name: "fetcher", extension: ".js" } },
    },
  },
  zod: {
    input,
    output: {
      target: "generated/orval/zod.ts",
      client: "zod",
      mode: "single",
    },
  },
};
