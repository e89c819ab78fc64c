// How orval's client sends a request: to the daemon that the call names.

export async function fetcher<T>(url: string, options: RequestInit & { baseUrl?: string }): Promise<T> {
  const { baseUrl, ...init } = options;
  const answer = await fetch(`${baseUrl ?? ""}${url}`, init);
  const text = await answer.text();
  const data: unknown = answer.headers.get("content-type")?.includes("json") ? JSON.parse(text) : text;
  return { status: answer.status, headers: answer.headers, data } as T;
}
