// Arrays in queries are repeated names; the zod schemas are strict, so that they find what the document does not say.
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
      override: { zod: { strict: { response: true } } },
    },
  },
};
